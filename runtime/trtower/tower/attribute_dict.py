"""A dict whose keys are attributes too, as model code expects of configs and of what an image processor returns."""

from typing import Any


class AttributeDict(dict[str, Any]):
    """Reads, sets and deletes a key by its name as an attribute. It is JSON as it stands, and pickled like any dict."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this {type(self).__name__} has no {name!r}; it holds {', '.join(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"this {type(self).__name__} has no {name!r} to delete") from None
