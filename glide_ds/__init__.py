"""Distributed fine-tuning of OpenAI's GLIDE with CLIP conditioning on DeepSpeed."""

__version__ = "0.1.0"
