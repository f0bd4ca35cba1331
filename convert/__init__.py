"""Between Hugging Face folders and what kd_jax writes."""
