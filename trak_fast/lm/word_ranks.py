"""Ranks of documents by the words that they share with a query: a baseline to hold attribution scores against."""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

WORD = re.compile(r"[^\W_]+")
"""A word: letters and digits of any script."""
SATURATION = 1.5
"""The k1 of BM25: the count of a word beyond which more of it adds little."""
LENGTH_SHARE = 0.75
"""The b of BM25: the share of a document's length, over the average, by which its counts are divided."""


class WordRanks:
    """The ranks of documents by Okapi BM25 (Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009).

    A word of n_w among n documents weighs log(1 + (n − n_w + ½)/(n_w + ½)): the ½ inside the logarithm keep the weight
    of a word that most documents have above zero. A word that a query repeats counts as often.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        """Counts the words of the documents.

        Args:
            texts: The documents' texts, (n,).
        """
        self._places: defaultdict[str, int] = defaultdict()
        self._places.default_factory = self._places.__len__  # a word not met before gets the next place
        words, counts, starts = array("i"), array("i"), [0]
        for text in texts:
            found = _count_words(text)
            words.extend(map(self._places.__getitem__, found))
            counts.extend(found.values())
            starts.append(len(words))
        self._places.default_factory = None

        shape = (len(texts), len(self._places))
        table = csr_array((np.array(counts, np.float64), np.array(words, np.int32), np.array(starts)), shape)
        lengths = table.sum(axis=1)
        holders = np.bincount(table.indices, minlength=shape[1])
        rarity = np.log1p((len(texts) - holders + 0.5) / (holders + 0.5))
        # max: without any word there is no entry to divide
        relative = np.repeat(lengths / max(lengths.sum() / max(len(texts), 1), 1), np.diff(table.indptr))
        table.data *= (SATURATION + 1) / (table.data + SATURATION * (1 - LENGTH_SHARE + LENGTH_SHARE * relative))
        table.data *= rarity[table.indices]
        self._weights = table.tocsc()

    def ranks(self, query: str) -> NDArray[np.int64]:
        """Ranks all documents for a query.

        Args:
            query: The query's text.

        Returns:
            The rank of each document from 1, (n,), int64; equal documents, those without a shared word among them, in
            the order of their rows.
        """
        found = {self._places[word]: count for word, count in _count_words(query).items() if word in self._places}
        scores = self._weights[:, sorted(found)] @ np.array([found[place] for place in sorted(found)], np.float64)
        ranks = np.empty(len(scores), np.int64)
        # in single precision: sums of the same parts in another order stay equal
        ranks[np.argsort(-scores.astype(np.float32), kind="stable")] = np.arange(1, len(scores) + 1)
        return ranks


def _count_words(text: str) -> Counter[str]:
    """Counts the words of a text, small and capital letters alike."""
    return Counter(WORD.findall(text.lower()))
