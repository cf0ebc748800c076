"""The reward model: a Hugging Face decoder, attention that shares the prompt, a score head and the loss, in one
forward; see README.md in this folder.
"""
