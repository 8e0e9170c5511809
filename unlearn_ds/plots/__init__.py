"""All pictures, drawn by matplotlib without a display."""
