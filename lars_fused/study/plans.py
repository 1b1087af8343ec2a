"""The plan of a study, kept beside its runs, so that `report` knows what they were for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from lars_fused.study import files
from lars_fused.study.errors import StudyError
from lars_fused.study.ranks import alone
from lars_fused.study.runs import facts
from lars_fused.study.settings import Settings

FILE = "study.json"

Same = TypeVar("Same", bound="StudyPlan")


@dataclass(frozen=True)
class StudyPlan:
    """What the plans of all studies have in common; every list of theirs is a tuple.

    Attributes:
        base: what all runs of the study share.
    """

    base: Settings

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"base": self.base.as_dict()}

    @classmethod
    def from_dict(cls: type[Same], saved: dict[str, Any]) -> Same:
        """What `as_dict` made, through JSON."""
        lists = {k: tuple(v) for k, v in saved.items() if isinstance(v, list)}
        return cls(**(saved | lists | {"base": Settings.from_dict(saved["base"])}))


def save(out: Path, command: str, plan: dict[str, Any]) -> None:
    """Write the plan of a command; a changed plan of the same command replaces the old one.

    Raises:
        StudyError: the folder holds another command's study.
    """
    path = out / FILE
    if path.exists():
        held = load(out)
        if held["study"] != command:
            raise StudyError(f"--out {out} holds a study of {held['study']}; choose another folder")
        if held["plan"] == files.plain(plan):
            return
    found = facts(alone())
    found["command"] = whole(found["command"])
    files.write_json(path, {"study": command, "plan": plan, **found})


def whole(command: Sequence[str]) -> list[str]:
    """A command without its --only: the study is the same whichever share of it ran first."""
    kept, after = [], False
    for word in command:
        if not (after or word.startswith("--only")):
            kept.append(word)
        after = word == "--only"
    return kept


def load(out: Path) -> dict[str, Any]:
    """The plan in a folder, under "plan"; its command under "study".

    Raises:
        StudyError: there is none.
    """
    path = out / FILE
    if not path.exists():
        raise StudyError(f"{out} holds no {FILE}: it is not the --out folder of a study")
    held = files.read_json(path)
    if not isinstance(held, dict) or not {"study", "plan"} <= held.keys():
        raise StudyError(f"{path} is not the plan of a study")
    return held
