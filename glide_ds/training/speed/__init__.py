"""How the same numbers come sooner or in less memory, and what that takes."""
