"""Text encoders behind one interface: token numbers in, one vector a token and one a text out."""
