"""Forms of input: what a row of a table says is to be forgotten, as text and the characters in it that are targets."""
