"""What is said of a camera's motion, language by language."""

from wordings.chinese import CHINESE
from wordings.english import ENGLISH
from wordings.french import FRENCH
from wordings.german import GERMAN
from wordings.japanese import JAPANESE
from wordings.language import ANY, Language
from wordings.spanish import SPANISH

LANGUAGES: dict[str, Language] = {
    "en": ENGLISH, "de": GERMAN, "fr": FRENCH, "es": SPANISH, "zh": CHINESE, "ja": JAPANESE,
}  # fmt: skip

__all__ = ["ANY", "LANGUAGES", "Language"]
