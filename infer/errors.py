"""What ip2p-infer tells a user instead of a traceback."""


class EditError(ValueError):
    """Something that the user can mend, said in one or two lines: a picture, prompt, setting or model."""
