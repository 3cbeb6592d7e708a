"""Past one machine: batch scoring and whole folders of models on Ray."""
