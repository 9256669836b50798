"""Show a tower's options in the API reference as Python shows them: by name, and not as `**options`.

griffe reads the code without importing it, so it does not see what the decorator `takes_options` does.
"""

from typing import Any

import griffe

OPTIONS = "tower.options.TowerOptions"


class Signatures(griffe.Extension):
    """Replaces `**options` of every function with `@takes_options` by the fields of `TowerOptions`."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Look at every function of the runtime package."""
        if pkg.name == "trtower":
            self._replace(pkg, list(pkg[OPTIONS].attributes.values()))

    def _replace(self, parent: Any, options: list[griffe.Attribute]) -> None:
        for member in parent.members.values():
            if member.is_alias:
                continue
            if member.is_module or member.is_class:
                self._replace(member, options)
            elif self._takes_options(member) and not self._describes_them_together(member):
                own = [each for each in member.parameters if each.kind is not griffe.ParameterKind.var_keyword]
                names = {each.name for each in own}
                shown = [
                    griffe.Parameter(
                        each.name,
                        annotation=each.annotation,
                        kind=griffe.ParameterKind.keyword_only,
                        default=each.value,
                    )
                    for each in options
                    if each.name not in names
                ]
                member.parameters = griffe.Parameters(*own, *shown)

    def _takes_options(self, member: Any) -> bool:
        return member.is_function and any(str(each.value) == "takes_options" for each in member.decorators)

    def _describes_them_together(self, function: Any) -> bool:
        """Whether a docstring refers to another for `**options`; a constructor is described in its class."""
        return any(each.docstring and "**options:" in each.docstring.value for each in (function, function.parent))
