"""Conversions between Hugging Face folders and the formats of kd_jax."""
