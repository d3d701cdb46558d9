"""Who is who on the federation plane: device credentials, the coordinator's list of them, certificates."""

from __future__ import annotations

from fedmp.identity.credentials import Credentials
from fedmp.identity.store import CredentialStore, Identity

__all__ = ["CredentialStore", "Credentials", "Identity"]
