"""Error feedback by differences to what the coordinator holds (EF21).

Richtarik, Sokolov and Fatkhullin, 2021, EF21: A New, Simpler, Theoretically Better, and Practically Faster Error
Feedback, algorithm 2. Client i and the coordinator both hold an estimate g_i of the client's update u_i, at first
zero, and of the client's next update only the compressed difference travels:

    c_i = C(u_i - g_i),      g_i' = g_i + c_i      on both sides; what counts as the client's update is g_i'.

If C loses at most a share 1 - a of what it is given, |u_i - g_i'|^2 <= (1 - a) |u_i - g_i|^2: the error goes to zero
while updates settle, without a bound on them, where a residual (`error_feedback` of the transforms) stays as large as
what a round cannot send.

Where we differ: u_i is what the client's local work comes to, which with one full-batch SGD step is the paper's
gradient times its rate. The paper's coordinator needs the mean of all g_i alone, since all clients take part in every
round; here it keeps each client's, so that the clients of a round may be any, weighed and combined in any way. (With
some of the clients a round, the step is the mean of theirs, not of all clients' latest as in EF21-PP of Fatkhullin et
al., 2021, EF21 with Bells & Whistles.)
"""

from __future__ import annotations

from fedmp.component import Component

__all__ = ["EF21"]


class EF21(Component):
    """Send what is new against what the coordinator holds of the client, instead of feeding back residuals.

    Comes before all other transforms but `Clip`. It takes the place of their own error feedback, and works with
    all that lose less than they are given, biased or not: `[ef21,topk]`, `[ef21,lowrank,int4,zstd]`. The coordinator
    keeps an update of every client on disk, so it suits some hundreds of clients that come again, not a million
    that come once.
    """
