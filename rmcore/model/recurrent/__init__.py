"""Recurrent layers over a packed row: each answer starts from the state that its prompt leaves behind."""
