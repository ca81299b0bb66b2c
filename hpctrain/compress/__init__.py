"""Making messages small: which entries to send, what to remember, how to write them down."""
