"""Raw trees in every form that images come in: their names, their labels and the places of their bytes."""
