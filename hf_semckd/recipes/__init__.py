"""From one file to a distilled student: the data, the models, the training and all that is told of it."""
