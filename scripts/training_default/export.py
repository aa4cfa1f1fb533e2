"""Write a trained model as a checkpoint folder."""


def export(model, vocabulary, out):
    raise NotImplementedError
