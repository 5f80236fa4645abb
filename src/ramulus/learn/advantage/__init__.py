"""Credit: from graded trees to a value for each leaf, node or token; one file a family of methods."""
