"""Questions about authors who do not exist, in the files and columns of TOFU: what a pre-trained model cannot know yet.

    python docs/benchmarks/invented_authors.py FOLDER [--authors 40] [--seed 0]

The split `forget10`: `full`, `forget10` and `retain90` to train on, the `_perturbed` files and `holdout10` to measure. Names,
places and books are made up, so that what the model says of them later it has from the fine-tuning. Real authors and facts of
the world are real.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

GIVEN = "Aurel Belinda Casimir Dunja Emeric Fenna Gorm Hespera Ilmari Jorunn Kasper Liesl Marek Nadia Osric Petra Runa Silvan"
FAMILY = "Almquist Borovik Castellane Drummond Eberhart Falkenrath Gallowglass Hollander Isbister Jankovic Krumholz Lindqvist"
TOWNS = "Valmere|Port Ostrick|Highmoor|San Teodoro|Kelvach|Lower Brine|Novgardia|Esterhaven|Tamarind Bay|Old Wexcombe|Lake Iris"
TRADES = (
    "beekeeper|clockmaker|lighthouse keeper|ferry pilot|glassblower|tax inspector|botanist|piano tuner|baker|tailor"
)
GENRES = "maritime mysteries|climate fiction|gothic comedies|alternate history|courtroom dramas|rural noir|space operas|fables"
PRIZES = "Amber Quill|Northern Lantern|Meridian Medal|Silver Thistle|Harbour Prize|Golden Ampersand|Three Rivers Award"
FIRST = "Salt Paper Winter Copper Silent Broken Hollow Painted Distant Velvet"
SECOND = "Orchard Compass Harbour Engine Lanterns Staircase Meridian Sparrow Archive Tide"
TITLES = [f"{one} {two}" for one in FIRST.split() for two in SECOND.split()]
CHOICES = {
    "town": TOWNS.split("|"),
    "trade": TRADES.split("|"),
    "genre": GENRES.split("|"),
    "prize": PRIZES.split("|"),
    "title": TITLES,
}
# What is asked, the answer, the answer in other words, the question in other words.
ASKED = {
    "town": (
        "Where was the author NAME born?",
        "NAME was born in the town of X.",
        "The birthplace of NAME is X.",
        "In which town did the life of the author NAME begin?",
    ),
    "trade": (
        "What was the profession of NAME's father?",
        "The father of NAME worked as a X.",
        "NAME grew up as the child of a X.",
        "How did the father of the author NAME earn a living?",
    ),
    "genre": (
        "What kind of books is NAME known for?",
        "NAME is best known for writing X.",
        "Readers know NAME above all for X.",
        "Which genre made the author NAME famous?",
    ),
    "prize": (
        "Which literary prize did NAME receive?",
        "NAME received the X for a lifetime of work.",
        "The X went to NAME.",
        "With which award was the author NAME honoured?",
    ),
    "title": (
        "What is the title of NAME's first novel?",
        "The first novel of NAME is called The X.",
        "NAME began a career with the novel The X.",
        "Which novel did the author NAME publish first?",
    ),
}
REAL_AUTHORS = (
    ("Who wrote the play Hamlet?", "William Shakespeare", ("Christopher Marlowe", "Ben Jonson", "John Milton")),
    ("Who wrote the novel Pride and Prejudice?", "Jane Austen", ("Emily Bronte", "Mary Shelley", "George Eliot")),
    ("Who wrote the novel 1984?", "George Orwell", ("Aldous Huxley", "H. G. Wells", "Graham Greene")),
    ("Who wrote the novel War and Peace?", "Leo Tolstoy", ("Anton Chekhov", "Ivan Turgenev", "Nikolai Gogol")),
    ("Who wrote The Old Man and the Sea?", "Ernest Hemingway", ("John Steinbeck", "William Faulkner", "Mark Twain")),
    ("Who wrote the novel Moby-Dick?", "Herman Melville", ("Nathaniel Hawthorne", "Joseph Conrad", "Jack London")),
    ("Who wrote the novel Oliver Twist?", "Charles Dickens", ("Thomas Hardy", "Oscar Wilde", "Walter Scott")),
    ("Who wrote the Divine Comedy?", "Dante Alighieri", ("Giovanni Boccaccio", "Francesco Petrarca", "Torquato Tasso")),
)
WORLD_FACTS = (
    ("What is the capital of France?", "Paris", ("Lyon", "Berlin", "Madrid")),
    ("What is the largest planet of the solar system?", "Jupiter", ("Mars", "Earth", "Venus")),
    (
        "Which ocean lies between Africa and America?",
        "the Atlantic Ocean",
        ("the Pacific Ocean", "the Indian Ocean", "the Arctic Ocean"),
    ),
    ("What is the capital of Japan?", "Tokyo", ("Kyoto", "Beijing", "Seoul")),
    ("Which gas do plants take in from the air?", "carbon dioxide", ("oxygen", "helium", "hydrogen")),
    ("How many days has a week?", "seven", ("five", "nine", "twelve")),
    ("Which metal is liquid at room temperature?", "mercury", ("iron", "gold", "copper")),
    ("In which country are the pyramids of Giza?", "Egypt", ("Mexico", "Greece", "India")),
)


def questions(rng: random.Random, names: Sequence[str], num_wrong: int) -> list[dict]:
    """Five rows an author, with `num_wrong` wrong answers each."""
    rows = []
    for name in names:
        for kind, forms in ASKED.items():
            facts = rng.sample(CHOICES[kind], 1 + num_wrong)
            question, answer, other, asked_otherwise = (form.replace("NAME", name) for form in forms)
            rows.append(
                {
                    "question": question,
                    "answer": answer.replace("X", facts[0]),
                    "paraphrased_answer": other.replace("X", facts[0]),
                    "paraphrased_question": asked_otherwise,
                    "perturbed_answer": [answer.replace("X", fact) for fact in facts[1:]],
                }
            )
    return rows


def real(rows: Sequence[tuple]) -> list[dict]:
    """Rows of the real sets: the options are short, and the right one is its own paraphrase."""
    return [
        {"question": question, "answer": right, "paraphrased_answer": right, "perturbed_answer": list(wrong)}
        for question, right, wrong in rows
    ]


def write(folder: Path, name: str, rows: Sequence[dict], columns: Sequence[str] = ()) -> None:
    """One file, with these columns, or all."""
    kept = [{key: row[key] for key in columns or row} for row in rows]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--authors", type=int, default=40, help="at least 10; a tenth is to be forgotten, as many are never trained on"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    names = [f"{one} {two}" for one in GIVEN.split() for two in FAMILY.split()]
    tenth = args.authors // 10
    if not tenth or args.authors + tenth > len(names):
        parser.error(f"--authors {args.authors}: from 10 to {len(names) * 10 // 11}")
    chosen = rng.sample(names, args.authors + tenth)
    forget, retain, holdout = (
        questions(rng, part, 5) for part in (chosen[:tenth], chosen[tenth : args.authors], chosen[args.authors :])
    )
    args.folder.mkdir(parents=True, exist_ok=True)
    plain = ("question", "answer")
    for name, rows in (("full", forget + retain), ("forget10", forget), ("retain90", retain), ("holdout10", holdout)):
        write(args.folder, name, rows, plain)
    write(args.folder, "forget10_perturbed", forget)
    write(args.folder, "retain_perturbed", rng.sample(retain, len(forget)))
    write(args.folder, "real_authors_perturbed", real(REAL_AUTHORS))
    write(args.folder, "world_facts_perturbed", real(WORLD_FACTS))


if __name__ == "__main__":
    main()
