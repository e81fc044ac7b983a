"""``report.json`` read back. The file may be anybody's, so every value is checked before it is used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from zqfp_compile.errors import ModelError, UsageError
from zqfp_compile.report.model import SCHEMA_VERSION
from zqfp_compile.text_file import UnreadableError, read_text

NAME = "report.json"
_MAX_BYTES = 1 << 26  # 200,000 layers
_LARGEST = 1e100


@dataclass(frozen=True)
class StoredLayer:
    """One linear layer: what :class:`zqfp_compile.report.model.LayerReport` says of it, as far as used."""

    name: str
    rewritten: bool
    weight_format: str
    lorc_rank: int
    sqnr_db: float | None


@dataclass(frozen=True)
class StoredReport:
    """One compile's ``report.json``.

    Attributes:
        path: The file.
        values: The JSON object, of our schema version.
    """

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> StoredReport:
        """Read the report of a compiled folder.

        Raises:
            UsageError: When the folder or its report is not there.
            ModelError: When the report cannot be read or has another form.
        """
        if not folder.is_dir():
            found = "is no folder" if folder.exists() else "no such folder"
            raise UsageError(f"{folder}: {found}; give a folder that zqfp-compile wrote")
        path = folder / NAME
        if not path.is_file():
            raise UsageError(f"{folder}: has no {NAME}; give a folder that zqfp-compile wrote")
        try:
            values = json.loads(read_text(path, _MAX_BYTES))
            version = values["schema_version"]
            if not isinstance(version, int):
                raise TypeError("a version is a number")
        except UnreadableError as error:
            raise ModelError(f"{path}: cannot be read ({error}); compile again") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelError(f"{path}: is no report of zqfp-compile; compile again") from error
        if version != SCHEMA_VERSION:
            raise ModelError(
                f"{path}: has schema version {str(version)[:20]!r}, this zqfp-compile reads "
                f"{SCHEMA_VERSION}; compile again, or compare with the version that wrote it"
            )
        return cls(path, values)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The options: scalars, lists of scalars, or lists of scalars by name.

        Raises:
            ModelError: When something else is there.
        """
        options = self._mapping(self.values.get("recipe") or {}, "recipe")
        for name, value in options.items():
            lists = value.values() if isinstance(value, dict) else [value]
            if isinstance(value, dict) and not all(isinstance(item, list) for item in lists):
                self._refuse(f"recipe.{name}", "an option")
            if not all(_is_scalar(part) for item in lists for part in _as_list(item)):
                self._refuse(f"recipe.{name}", "an option")
        return options

    @cached_property
    def layers(self) -> dict[str, StoredLayer]:
        """The layers by name, in graph order.

        Raises:
            ModelError: When something else is there.
        """
        found = self.values.get("layers")
        if not isinstance(found, list):
            self._refuse("layers", "a list")
        layers = (self._layer(self._mapping(item, f"layers.{i}"), i) for i, item in enumerate(found))
        return {layer.name: layer for layer in layers}

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds per step, in run order.

        Raises:
            ModelError: When something else is there.
        """
        found = self._mapping(self.values.get("seconds") or {}, "seconds")
        return {name: self._number(value, f"seconds.{name}") for name, value in found.items()}

    def number(self, *keys: str) -> float | None:
        """Return the number under a path of keys; ``None`` when it was not measured.

        Raises:
            ModelError: When something else is there.
        """
        value = self._at(keys)
        return None if value is None else self._number(value, ".".join(keys))

    def text(self, *keys: str) -> str | None:
        """Return the text under a path of keys; ``None`` when there is none.

        Raises:
            ModelError: When something else is there.
        """
        value = self._at(keys)
        return None if value is None else self._text(value, ".".join(keys))

    def _at(self, keys: tuple[str, ...]) -> Any:
        value: Any = self.values
        for i, key in enumerate(keys):
            value = self._mapping(value, ".".join(keys[:i])).get(key)
            if value is None:
                return None
        return value

    def _layer(self, item: dict[str, Any], index: int) -> StoredLayer:
        place = f"layers.{index}"
        if not isinstance(item.get("rewritten"), bool):
            self._refuse(f"{place}.rewritten", "true or false")
        sqnr_db = item.get("sqnr_db")
        return StoredLayer(
            name=self._text(item.get("name"), f"{place}.name"),
            rewritten=item["rewritten"],
            weight_format=self._text(item.get("weight_format"), f"{place}.weight_format"),
            lorc_rank=round(self._number(item.get("lorc_rank"), f"{place}.lorc_rank")),
            sqnr_db=None if sqnr_db is None else self._number(sqnr_db, f"{place}.sqnr_db"),
        )

    def _mapping(self, value: Any, place: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._refuse(place, "an object")
        return value

    def _text(self, value: Any, place: str) -> str:
        if not isinstance(value, str):
            self._refuse(place, "text")
        return value

    def _number(self, value: Any, place: str) -> float:
        # The bound also refuses NaN, infinities, and integers that no float holds.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _LARGEST:
            self._refuse(place, "a number")
        return float(value)

    def _refuse(self, place: str, wanted: str) -> NoReturn:
        shown = place if place.isprintable() and len(place) < 100 else "a value"
        raise ModelError(f"{self.path}: {shown} is not {wanted}; compile again")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_scalar(value: Any) -> bool:
    return (
        value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
    )
