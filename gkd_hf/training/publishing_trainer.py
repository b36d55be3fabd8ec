"""What becomes of a trained model: saved whole, exported for others, pushed to the Hub with its card."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch.utils.data import IterableDataset
from transformers import Trainer

from gkd_hf.errors import InputError
from gkd_hf.evaluation.domain_report import package_versions
from gkd_hf.hub.model_card import GKDModelCard
from gkd_hf.hub.push import push_folder
from gkd_hf.hub.repo_names import RepoNames
from gkd_hf.hub.run_facts import RunFacts, StageRecorder
from gkd_hf.hub.short_paths import shortened
from gkd_hf.training.arguments import PUSH_REFUSED
from gkd_hf.training.sharding import whole_state_dict


class PublishingTrainer(Trainer, ABC):
    """A `Trainer` whose model is saved and pushed as what others load: no checkpoint, no pickle.

    Attributes:
        artefact: what others get of the trained model. title: the stage's name. recorder: of how its training went.
    """

    artefact: ClassVar[Literal["encoder", "segmenter"]]
    title: str
    recorder: StageRecorder

    @abstractmethod
    def export(self, folder: str | os.PathLike, facts: RunFacts, image_size: int) -> None:
        """Write the trained model to a folder as it goes to the Hub, and tell the facts of it.

        Every process must call it; the main one writes.
        """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained model whole, however it is trained. Every process must call it; the main one writes.

        Checkpoints, which Trainer writes itself, are what training goes on with instead.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        weights = whole_state_dict(self)
        if self.args.should_save:
            self.write_model(output_dir or self.args.output_dir, weights)

    @abstractmethod
    def write_model(self, folder: str | os.PathLike, weights: dict[str, torch.Tensor]) -> None:
        """Write what others load to a folder.

        Args:
            weights: all of them, as `whole_state_dict` returns them; this is for one process alone.
        """

    def card_settings(self) -> dict[str, Any]:
        """What a card can tell without a recipe, in a recipe's keys."""
        return {"seed": self.args.seed}

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        *,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        license: str | None = None,
    ) -> str | None:
        """Export the trained encoder or segmenter with its card, and push that: no checkpoint, no pickle.

        Args:
            commit_message: first line of the commit. repo_id: ``org/name``; None: ``args.hub_model_id``.
            private: whether a new repo is; None: ``args.hub_private_repo``, or else private.
            token: None takes HF_TOKEN or what ``hf auth login`` stored.
            license: the Hub's licence id; None: `other`, since the trainer does not know the terms of its data.

        Returns:
            URL of the repo; None in processes that are not the main one.

        Raises:
            InputError: no repo id, or the push failed; the message ends with the command that tries again.
        """
        repo_id = repo_id or self.args.hub_model_id
        if repo_id is None:
            raise InputError("say where to push: trainer.push_to_hub(repo_id='org/name'), or hub_model_id='org/name'")
        folder = Path(self.args.output_dir) / self.artefact
        facts = self._card_facts()
        self.export(folder, facts, self._image_size())
        if not self.is_world_process_zero():
            return None
        self._card(facts, repo_id, license, folder).save(folder)
        if private is None:
            private = self.args.hub_private_repo is not False
        return push_folder(folder, repo_id, private=private, token=token, summary=commit_message)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Refuse what `Trainer` calls this for: pushing while it trains, also where it was switched on later."""
        raise InputError(PUSH_REFUSED)

    def create_model_card(self, license: str | None = None) -> None:
        """Write the card of the model as it stands to README.md in the output folder."""
        if self.is_world_process_zero():
            self._card(self._card_facts(), self.args.hub_model_id, license).save(self.args.output_dir)

    def _card_facts(self) -> RunFacts:
        stages = {self.title: self.recorder.facts} if self.recorder.facts is not None else {}
        return RunFacts(settings=self.card_settings(), stages=stages, versions=package_versions())

    def _card(
        self, facts: RunFacts, repo_id: str | None, license: str | None, folder: Path | None = None
    ) -> GKDModelCard:
        name = repo_id or f"{shortened(self.args.output_dir)}/{self.artefact}"
        files = frozenset(path.name for path in folder.iterdir()) if folder is not None else frozenset()
        names = RepoNames(name, name, on_hub=repo_id is not None)
        return GKDModelCard(self.artefact, facts, names, files=files, license=license)

    def _image_size(self) -> int:
        data = self.train_dataset
        sample = next(iter(data)) if isinstance(data, IterableDataset) else data[0]
        return int(sample["pixel_values"].shape[-1])
