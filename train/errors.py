"""The one kind of error that the training's programs print as a sentence."""


class TrainError(Exception):
    """What a person can put right: printed without a traceback."""
