"""Arguments of callers, and locks. The rest of the package uses this folder, which imports only torch."""
