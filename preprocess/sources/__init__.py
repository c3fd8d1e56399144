"""The forms that raw images come in: each lists names, labels and where the bytes lie."""
