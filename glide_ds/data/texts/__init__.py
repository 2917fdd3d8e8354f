"""From the text members of a sample to its caption."""
