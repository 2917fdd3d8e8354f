"""What ends a run before its last step: requests, hangs, lost ranks, errors."""
