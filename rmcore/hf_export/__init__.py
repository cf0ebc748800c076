"""Turns trained weights into a Hugging Face directory and checks it by reloading; see README.md in this folder."""
