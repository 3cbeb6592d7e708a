"""From a folder of normal images to a bundle: data, recipes, the loop, export."""
