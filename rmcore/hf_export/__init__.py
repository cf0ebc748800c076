"""Trained weights in, a Hugging Face directory out, compared with the engine after reloading."""
