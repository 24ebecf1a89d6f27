"""The decode loop: sequences, their key-value memory, picking tokens, text in and out."""
