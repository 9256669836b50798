from tests.runtime.installation.original import IMAGE_TOKEN_INDEX

DEFAULT_IMAGE_TOKEN = "<image>"
__all__ = ["DEFAULT_IMAGE_TOKEN", "IMAGE_TOKEN_INDEX"]
