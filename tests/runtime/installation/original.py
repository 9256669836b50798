"""Small versions of LLaVA, LLaVA-NeXT, VILA and tinychat: how their code calls a tower, written anew.

Their repositories are not packages that a test could install. These models do to a tower what the originals do: which
members they touch, where they hold it, which state they read and how they cut it.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.conftest import IMAGE_SIZE
from tests.runtime.installation.hugging_face import TEXT, VOCABULARY, draw
from trtower.tower.image_processor import ImageProcessor

IMAGE_TOKEN_INDEX = -200
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": IMAGE_SIZE},
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
}
WIDTH = int(TEXT["hidden_size"])


class ClipWrapper(nn.Module):
    """LLaVA's `CLIPVisionTower`."""

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False) -> None:
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = vision_tower
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        if delay_load:
            self.cfg_only = transformers.CLIPVisionConfig.from_pretrained(vision_tower)
        else:
            self.load_model()

    def load_model(self, device_map: Any = None) -> None:
        if self.is_loaded:
            return
        self.image_processor = ImageProcessor(PREPROCESSOR)
        self.vision_tower = transformers.CLIPVisionModel.from_pretrained(self.vision_tower_name, device_map=device_map)
        self.vision_tower.requires_grad_(False)
        self.is_loaded = True

    def feature_select(self, outputs: Any) -> Tensor:
        states = outputs.hidden_states
        if self.select_feature == "slicefour_patch":  # LLaVA-NeXT's
            step = len(states) // 4
            picked = [states[index] for index in range(step + self.select_layer, len(states), step)]
            return torch.cat(picked, dim=-1)[:, 1:]
        features = states[self.select_layer]
        return features[:, 1:] if self.select_feature == "patch" else features

    @torch.no_grad()
    def forward(self, images: Any) -> Any:
        if type(images) is list:
            outputs = [self.vision_tower(self.bring(image.unsqueeze(0)), output_hidden_states=True) for image in images]
            return [self.feature_select(out).to(image.dtype) for out, image in zip(outputs, images, strict=True)]
        return self.feature_select(self.vision_tower(self.bring(images), output_hidden_states=True)).to(images.dtype)

    def bring(self, images: Tensor) -> Tensor:
        return images.to(device=self.device, dtype=self.dtype)

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def config(self) -> Any:
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size * (4 if self.select_feature.startswith("slicefour") else 1)

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2


class SiglipWrapper(nn.Module):
    """LLaVA-NeXT's `SigLipVisionTower`: it drops the last layer and the head, and reads the last remaining state."""

    def __init__(self, vision_tower: str) -> None:
        super().__init__()
        self.is_loaded = True
        self.vision_tower = transformers.SiglipVisionModel.from_pretrained(vision_tower)
        inner = getattr(self.vision_tower, "vision_model", self.vision_tower)
        del inner.encoder.layers[-1:]
        inner.head = nn.Identity()
        self.vision_tower.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.vision_tower(images.to(self.vision_tower.dtype), output_hidden_states=True)
        return outputs.hidden_states[-1].to(images.dtype)

    @property
    def config(self) -> Any:
        return self.vision_tower.config

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size


class MetaModel(nn.Module):
    """`LlavaMetaModel`: what `get_model()` returns; under FSDP it holds the wrapper in a list."""

    def __init__(self, wrapper: Any, *, fsdp: bool) -> None:
        super().__init__()
        self.vision_tower = [wrapper] if fsdp else wrapper
        self.mm_projector = nn.Linear(wrapper.hidden_size, WIDTH)

    def get_vision_tower(self) -> Any:
        tower = getattr(self, "vision_tower", None)
        return tower[0] if type(tower) is list else tower


class Multimodal(nn.Module):
    """What all of them do with features: project them, and replace an image's token with them."""

    def __init__(self) -> None:
        super().__init__()
        self.llm: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
        draw(self.llm)

    @property
    def device(self) -> torch.device:
        return next(self.llm.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.llm.parameters()).dtype

    def embed(self, input_ids: Tensor, images: Any) -> Tensor:
        embed = self.llm.get_input_embeddings()
        if images is None:
            return embed(input_ids)
        if type(images) is list or images.ndim == 5:  # AnyRes: the tiles of each image
            tiles = self.encode_images(torch.cat(list(images))).split([len(image) for image in images])
            features = [each.flatten(0, 1) for each in tiles]
        else:
            features = list(self.encode_images(images))
        parts: list[Tensor] = []
        for token in input_ids[0]:
            parts.append(features.pop(0) if token == IMAGE_TOKEN_INDEX else embed(token[None]))
        return torch.cat(parts)[None]

    def forward(self, input_ids: Tensor, images: Any = None) -> Any:
        return self.llm(inputs_embeds=self.embed(input_ids, images))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, images: Any = None, image_sizes: Any = None, **options: Any) -> Tensor:
        del image_sizes
        embeds = self.embed(input_ids, images)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        return self.llm.generate(inputs_embeds=embeds, attention_mask=mask, pad_token_id=0, **options)

    def encode_images(self, images: Tensor) -> Tensor:
        raise NotImplementedError


class Llava(Multimodal):
    """LLaVA, and LLaVA-NeXT: `model.get_model().get_vision_tower()`."""

    def __init__(self, wrapper: Any, config: Any, *, fsdp: bool = False) -> None:
        super().__init__()
        self.config = config
        self.model = MetaModel(wrapper, fsdp=fsdp)

    def get_model(self) -> MetaModel:
        return self.model

    def get_vision_tower(self) -> Any:
        return self.get_model().get_vision_tower()

    def encode_images(self, images: Tensor) -> Tensor:
        return self.get_model().mm_projector(self.get_model().get_vision_tower()(images))


class Tinychat(Llava):
    """tinychat: it calls the vision model in the wrapper, reads the layer in its own config, and tests its class."""

    def encode_images(self, images: Tensor) -> Tensor:
        tower = self.get_vision_tower().vision_tower
        dtype = next(tower.parameters()).dtype
        states = tower(images.to(dtype), output_hidden_states=True).hidden_states
        layer = self.config.mm_vision_select_layer
        if abs(layer) > 100:
            features = torch.cat([states[abs(layer) % 100], states[-(abs(layer) // 100)]], dim=-1)
        else:
            features = states[layer]
        if isinstance(tower, transformers.CLIPVisionModel):
            features = features[:, 1:].to(images.dtype)
        return self.model.mm_projector(features)


class Vila(Multimodal):
    """VILA: the model itself holds the wrapper, and saves each part into a separate folder."""

    def __init__(self, wrapper: Any, config: Any) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = wrapper
        self.mm_projector = nn.Linear(wrapper.hidden_size, WIDTH)

    def get_vision_tower(self) -> Any:
        return self.vision_tower

    def encode_images(self, images: Tensor) -> Tensor:
        return self.mm_projector(self.get_vision_tower()(images))

    def generate_content(self, prompt: list[Any]) -> str:
        media, text = prompt
        images = self.vision_tower.image_processor.preprocess(media.picture, return_tensors="pt")["pixel_values"]
        ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, *Letters().encode(text)]])
        return Letters().batch_decode(self.generate(ids, images, max_new_tokens=8, do_sample=False))[0]

    def save_pretrained(self, folder: Path) -> None:
        state = {
            name.rpartition("vision_tower.vision_tower.")[2]: tensor
            for name, tensor in self.state_dict().items()
            if "vision_tower" in name
        }
        self.vision_tower.vision_tower.save_pretrained(folder / "vision_tower", state_dict=state)


class Letters:
    """A tokenizer that turns each letter into a token."""

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % (VOCABULARY - 10) for letter in text]

    def batch_decode(self, tokens: Tensor, skip_special_tokens: bool = True) -> list[str]:
        return ["".join(chr(33 + token) for token in row if token > 2) for row in tokens.tolist()]


def draw_llava(path: str) -> Llava:
    """Draw a LLaVA around the tower at ``path``, the same one every time."""
    torch.manual_seed(5)
    return Llava(ClipWrapper(path, config()), config()).eval()


def draw_vila(path: str) -> Vila:
    torch.manual_seed(5)
    return Vila(ClipWrapper(path, config()), config()).eval()


def config(layer: int = -2, feature: str = "patch") -> Any:
    return SimpleNamespace(mm_vision_select_layer=layer, mm_vision_select_feature=feature)
