"""Pictures drawn: in Python, by `glide-ds sample`, on a page."""
