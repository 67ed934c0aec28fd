"""What is wrong with an encode as far as it can be told at once: before torch is imported, which takes seconds."""

from .base.files import check_folder
from .config import EncodeConfig
from .data.places import check_dataset, check_place
from .models.hub import check_name


def check(config: EncodeConfig) -> None:
    """Look at the places that the flags name.

    Raises:
        SettingsError: the cache cannot lie where it shall.
        SourceError: the dataset, a folder or file of this machine, is not there.
        ModelError: neither is a model.
    """
    push = ": encode into one, then `ip2p-cache push` copies it there"
    check_folder(config.cache, "--cache", push)
    check_place(config.dataset, config.cache, "--cache", alone=True)
    check_dataset(config.dataset)
    model = config.model
    check_name(model.pretrained_model_name_or_path, "", "--pretrained_model_name_or_path")
    if model.pretrained_vae_model_name_or_path:
        check_name(model.pretrained_vae_model_name_or_path, "the VAE ", "--pretrained_vae_model_name_or_path")
