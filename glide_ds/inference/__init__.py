"""From a model to pictures, and what held-out samples say of it."""
