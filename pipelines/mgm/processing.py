"""`MGMProcessor`: images and text in, model inputs out."""

from __future__ import annotations

from typing import Any

from transformers import AddedToken, AutoProcessor, BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .configuration import MGMConfig
from .image_processing import MGMImageProcessor
from .templates import CHAT_TEMPLATES


class MGMProcessor(ProcessorMixin):
    """Expands each `<image>` of the text to the image's visual tokens and prepares the pixels.

    Args:
        image_processor: an `MGMImageProcessor`.
        tokenizer: any tokenizer. `<image>` is added to it as a special token if it lacks it, and it pads on the left.
        num_image_tokens: visual tokens of one image (`MGMConfig.num_image_tokens`).
        chat_template: Jinja; the templates of the language models are in `templates.CHAT_TEMPLATES`.
    """

    image_token = "<image>"

    def __init__(
        self,
        image_processor: MGMImageProcessor | None = None,
        tokenizer: Any = None,
        num_image_tokens: int = 576,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_token_id = self.add_image_token(tokenizer)
        tokenizer.padding_side = "left"  # or batched generation continues from padding
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def add_image_token(cls, tokenizer: PreTrainedTokenizerBase) -> int:
        """Make `<image>` one special token of `tokenizer`, if it is not yet, and return its id."""
        if cls.image_token not in tokenizer.get_vocab():
            tokenizer.add_tokens(AddedToken(cls.image_token, special=True, normalized=False), special_tokens=True)
        return int(tokenizer.convert_tokens_to_ids(cls.image_token))  # type: ignore[arg-type]

    @classmethod
    def from_config(
        cls, config: MGMConfig, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = "gemma", **kwargs: Any
    ) -> MGMProcessor:
        """The processor of a model with this configuration.

        Args:
            chat_template: a name of `templates.CHAT_TEMPLATES`, or Jinja.
            kwargs: for the image processor.

        Raises:
            ValueError: the tokenizer's `<image>` is not `config.image_token_id`.
        """
        processor = cls(
            image_processor=MGMImageProcessor.from_config(config, **kwargs),
            tokenizer=tokenizer,
            num_image_tokens=config.num_image_tokens,
            chat_template=CHAT_TEMPLATES.get(chat_template or "", chat_template),
        )
        limit = getattr(config.text_config, "max_position_embeddings", None)
        if limit is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
        if processor.image_token_id != config.image_token_id:
            raise ValueError(
                f"the tokenizer's {cls.image_token} has id {processor.image_token_id}, "
                f"the configuration's image_token_id is {config.image_token_id}"
            )
        return processor

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """Prompts and their images -> model inputs, `<image>` expanded. Everything else is as in transformers.

        Raises:
            ValueError: placeholders and images do not match, truncation would cut into an image, or a prompt is longer
                with its images than `tokenizer.model_max_length`.
        """
        inputs = super().__call__(images=images, text=text, **kwargs)
        limit = self.tokenizer.model_max_length
        for row, mask in enumerate(inputs.get("attention_mask", [])):
            if len(mask) > limit and (length := int(sum(mask))) > limit:
                raise ValueError(
                    f"prompt {row} is {length} tokens long with its images, over the context of {limit} "
                    "(tokenizer.model_max_length)"
                )
        return inputs

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which forgets whether a Llama tokenizer is `legacy`: loaded again it would put its seams
        elsewhere.
        """
        if hasattr(self.tokenizer, "legacy"):
            self.tokenizer.init_kwargs["legacy"] = self.tokenizer.legacy
        return super().save_pretrained(save_directory, *args, **kwargs)

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:  # type: ignore[override]
        """Besides transformers' own checks: as many images as placeholders in all, which it counts from 5.20 on, and in
        each row.
        """
        super().validate_inputs(images=images, text=text, **kwargs)
        texts = [text] if isinstance(text, str) else text or []
        found = sum(sample.count(self.image_token) for sample in texts)
        given = 0 if images is None else len(make_flat_list_of_images(images))  # type: ignore[arg-type]
        if text is not None and found != given:
            raise ValueError(
                f"the number of {self.image_token} in the text must be the same as the number of images: "
                f"{found} in the text, but {given or 'no'} images were passed"
            )
        if isinstance(text, list) and isinstance(images, (list, tuple)) and len(images) == len(text):
            for row, (sample, own) in enumerate(zip(text, images, strict=True)):
                if isinstance(own, (list, tuple)) and len(own) != sample.count(self.image_token):
                    raise ValueError(
                        f"row {row} has {sample.count(self.image_token)} {self.image_token} and {len(own)} images"
                    )

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, except that an `<image>` typed in a message's text stays text.

        Images are given as parts of type "image". Text that spells the placeholder must not take their place, so such
        conversations are tokenized with `sanitize_control_tokens=True`. Before 5.20 transformers cannot do that: there,
        such conversations have more placeholders than images.

        Raises:
            ValueError: a message's text has `<image>` in it and the prompt is wanted as a string (or transformers is
                older), where it cannot be told from a real one.
        """
        if "sanitize_control_tokens" not in kwargs and self._spells_image_token(conversation):
            if not kwargs.get("tokenize"):
                raise ValueError(
                    f"a message's text has {self.image_token} in it: use tokenize=True, or images as parts"
                )
            kwargs["sanitize_control_tokens"] = True
        return super().apply_chat_template(conversation, *args, **kwargs)

    def _spells_image_token(self, conversation: Any) -> bool:
        messages = (m for c in conversation for m in (c if isinstance(c, (list, tuple)) else [c]))
        for message in messages:
            content = message.get("content") or ""
            parts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
            if any(self.image_token in part for part in parts):
                return True
        return False

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """What stands for one image in the expanded text."""
        return self.image_token * self.num_image_tokens


AutoProcessor.register(MGMConfig, MGMProcessor, exist_ok=True)

__all__ = ["MGMProcessor"]
