from PIL import Image as Pictures


class Image:
    def __init__(self, path: str) -> None:
        self.picture = Pictures.open(path).convert("RGB")
