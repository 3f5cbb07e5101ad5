"""Make question answering data: questions.json,
questions_eval.json and corpus.jsonl in one directory.

    # data/qa: an invented world, the same bytes every time
    python data/make_qa.py
    # your Markdown and text files; see data/README.md
    python data/make_qa.py --from-texts DIR --output my_qa

The invented world has people, places, companies and works, with a passage each, so that nothing is
known beforehand. A one-hop question asks for what the passage of an entity says; a two-hop question
for what another one says of an entity that the first one names. Names share words and passages name
other entities, so a search finds more than the right passage. Training and held-out entities are
two worlds in one corpus: no invented word stands in both.
"""

import json
import random
import re
import sys
import tempfile
import textwrap
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiment_multiturn_qa"))
from answers import holds_gold, normalize_answer  # noqa: E402
from run import fail  # noqa: E402
from search import Search, build_index  # noqa: E402

OUTPUT = Path(__file__).resolve().parent / "qa"

# ---------------------------------------------------------------- an invented world
ONSETS, VOWELS, CODAS = "bdfgklmnprstvz", "aeiou", "lmnrsx"
OCCUPATIONS = ("painter", "engineer", "doctor", "singer", "teacher", "pilot")
INDUSTRIES = ("shipping", "glass", "paper", "coffee", "steel")
PRODUCTS = ("cheese", "lace", "clocks", "salt", "honey")
KINDS = ("novel", "film", "opera", "play")
PLACE_BEGINNINGS = ("New", "Old", "Upper", "Lower", "Port", "Fort", "Lake", "Mount")
COMPANY_ENDINGS = (
    "Lines",
    "Mills",
    "Bank",
    "Foods",
    "Motors",
    "Press",
    "Trade",
    "Tools",
    "Group",
    "Sons",
)
COMPANY_ENDINGS += ("Brothers", "Union", "Partners", "Energy", "Mines", "Farms", "Labs", "Systems")
WORK_BEGINNINGS = (
    "Bridge",
    "Garden",
    "House",
    "Island",
    "Letter",
    "Lamp",
    "Mirror",
    "Night",
    "Song",
    "Tower",
)
WORK_BEGINNINGS += ("Winter",)
PASSAGES = {
    "person": (
        "{occupation} born in {birthplace} in {year}, now with {employer}.",
        "born in {year} in {birthplace}, {occupation} at {employer}.",
    ),
    "company": (
        "{industry} company in {seat}, founded by {founder} in {year}.",
        "founded in {year} by {founder}, {industry} company in {seat}.",
    ),
    "place": (
        "town on the river {river}, known for {product}; its mayor is {mayor}.",
        "town known for {product}, its mayor is {mayor}, its river the {river}.",
    ),
    "work": (
        "{kind} by {author}, set in {setting}, published in {year}.",
        "{kind} of {year}, made by {author} and set in {setting}.",
    ),
}
QUESTIONS = {  # what is asked of an entity of a kind
    "person": {
        "birthplace": ("Where was {} born?", "What is the birthplace of {}?"),
        "year": ("When was {} born?", "In which year was {} born?"),
        "employer": ("Who does {} work for?", "Which company is {} with?"),
    },
    "company": {
        "seat": ("Where is {} based?", "In which town is {}?"),
        "founder": ("Who founded {}?", "By whom was {} founded?"),
        "year": ("When was {} founded?", "In which year was {} founded?"),
    },
    "place": {
        "river": ("On which river is {}?", "Which river flows through {}?"),
        "mayor": ("Who is the mayor of {}?", "Who runs {}?"),
    },
    "work": {
        "author": ("Who is the author of {}?", "Who made {}?"),
        "setting": ("Where is {} set?", "In which town is {} set?"),
        "year": ("When was {} published?", "In which year was {} published?"),
    },
}
NAMED_BY = {  # how a two-hop question names one entity by another: relation -> (its kind, words)
    "birthplace": ("place", "the birthplace of {}"),
    "employer": ("company", "the company that {} is with"),
    "seat": ("place", "the town that {} is based in"),
    "founder": ("person", "the founder of {}"),
    "mayor": ("person", "the mayor of {}"),
    "author": ("person", "the author of {}"),
    "setting": ("place", "the town that {} is set in"),
}


@dataclass
class Entity:
    name: str
    kind: str
    facts: dict[str, str]
    text: str


@dataclass
class Question:
    """The searches that lead to the answer are for the entities' names, in this order;
    two-hop questions have two."""

    text: str
    answer: str
    relation: str  # of the answer
    entities: list[Entity]


def invent_words(rng, count, held_out):
    """Different capitalised words of two or three syllables,
    of the training world or of the held-out one."""
    words = {}
    while len(words) < count:
        letters = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 2, 3)))]
        word = "".join(letters) + rng.choice(CODAS)
        if (zlib.crc32(word.encode()) % 5 == 0) == held_out:
            words[word.capitalize()] = None
    return list(words)


def invent_names(rng, count, make):
    names = {}
    while len(names) < count:
        names[make()] = None
    return list(names)


def make_world(rng, size, held_out=False):
    """`size` entities, {name: Entity}, which name each other."""
    words = invent_words(rng, size // 2, held_out)
    first_names, surnames, towns, rivers = (words[i::4] for i in range(4))
    counts = {"person": size * 4 // 10, "place": size // 6, "company": size // 6}
    counts["work"] = size - sum(counts.values())
    names = {
        "person": lambda: f"{rng.choice(first_names)} {rng.choice(surnames)}",
        "place": lambda: (
            f"{rng.choice(PLACE_BEGINNINGS) if rng.random() < 0.2 else ''} "
            f"{rng.choice(towns)}".strip()
        ),
        "company": lambda: f"{rng.choice(surnames)} {rng.choice(COMPANY_ENDINGS)}",
        "work": lambda: f"The {rng.choice(WORK_BEGINNINGS)} of {rng.choice(towns + surnames)}",
    }
    names = {kind: invent_names(rng, counts[kind], make) for kind, make in names.items()}
    world = {}
    for kind, some in names.items():
        for name in some:
            person, place, company = (rng.choice(names[k]) for k in ("person", "place", "company"))
            facts = {"year": str(rng.randint(1801, 2020))}
            if kind == "person":
                facts |= {
                    "occupation": rng.choice(OCCUPATIONS),
                    "birthplace": place,
                    "employer": company,
                }
            elif kind == "company":
                facts |= {"industry": rng.choice(INDUSTRIES), "seat": place, "founder": person}
            elif kind == "place":
                facts |= {
                    "river": rng.choice(rivers),
                    "product": rng.choice(PRODUCTS),
                    "mayor": person,
                }
            else:
                facts |= {"kind": rng.choice(KINDS), "author": person, "setting": place}
            world[name] = Entity(name, kind, facts, rng.choice(PASSAGES[kind]).format(**facts))
    return world


def make_question(rng, world, names, hops):
    """A random question about one of `names`, the keys of the world, over one or two passages."""
    first = world[rng.choice(names)]
    if hops == 1:
        relation = rng.choice(list(QUESTIONS[first.kind]))
        text = rng.choice(QUESTIONS[first.kind][relation]).format(first.name)
        return Question(text, first.facts[relation], relation, [first])
    link = rng.choice([relation for relation in first.facts if relation in NAMED_BY])
    kind, words = NAMED_BY[link]
    second = world[first.facts[link]]
    relation = rng.choice(list(QUESTIONS[kind]))
    text = rng.choice(QUESTIONS[kind][relation]).format(words.format(first.name))
    return Question(text, second.facts[relation], relation, [first, second])


# passages of a search, when it is checked that a question takes as many searches as it has hops
TOP_K = 2


def found_titles(question, index):
    """The titles that a search for each of its names finds;
    None where one does not find the passage of its name."""
    found = [[title for title, _ in index.passages(entity.name)] for entity in question.entities]
    return (
        found
        if all(entity.name in titles for entity, titles in zip(question.entities, found))
        else None
    )


def is_proper(question, index):
    """Whether searches for the names find each passage, and neither the question itself as a query
    nor a search for its first name finds what a second one is for."""
    if not found_titles(question, index):
        return False
    passages = index.passages(question.text) + index.passages(question.entities[0].name)
    return len(question.entities) == 1 or not any(
        question.answer in f"{title} {text}" for title, text in passages
    )


def make_questions(rng, world, index, count):
    """`count` different questions, half of them two-hop, in random order."""
    names, questions = list(world), {}
    while len(questions) < count:
        question = make_question(rng, world, names, 1 + len(questions) % 2)
        if is_proper(question, index):
            questions[question.text] = question
    questions = list(questions.values())
    rng.shuffle(questions)
    return questions


def write_world(config):
    """corpus.jsonl and the two files of questions about it, each from one world of its own."""
    rng = random.Random(config.seed)
    held_out_size = config.passages * 3 // 20
    worlds = [
        make_world(rng, config.passages - held_out_size),
        make_world(rng, held_out_size, held_out=True),
    ]
    entities = [entity for world in worlds for entity in world.values()]
    rng.shuffle(entities)
    ids = {entity.name: f"{entity.kind}-{number}" for number, entity in enumerate(entities)}
    passages = [
        {"id": ids[entity.name], "title": entity.name, "text": entity.text} for entity in entities
    ]
    write_rows(config.output / "corpus.jsonl", passages)
    with tempfile.TemporaryDirectory() as folder:
        build_index(Path(folder) / "index", "", [(entity.name, entity.text) for entity in entities])
        index = Search(Path(folder) / "index", TOP_K)
        counts = {"questions": config.questions, "questions_eval": config.eval_questions}
        for (name, count), world in zip(counts.items(), worlds):
            rows = [
                {
                    "chunk_id": ids[question.entities[-1].name],
                    "question": question.text,
                    "answer": question.answer,
                    "difficulty": ("one_hop", "two_hop")[len(question.entities) - 1],
                }
                for question in make_questions(rng, world, index, count)
            ]
            write_rows(config.output / f"{name}.json", rows)


# ---------------------------------------------------------------- from texts
TEXTS = (".md", ".markdown", ".txt")
BREAK = re.compile(r"\n\s*\n|(?<=[.!?])\s+|(?<=[。！？])")  # between paragraphs or sentences
# a name or number, not in front
GAP = re.compile(r"(?<=[\w,;] )(?:[A-Z]\w+(?: [A-Z]\w+)*|[0-9]+(?:[.,][0-9]+)*)")
REQUEST = """Write one question that the passage answers, and its answer, a few words that \
stand in the passage. The
question must make sense to somebody who does not see the passage.

Passage: {title}. {text}

Reply with two lines:
Question: ...
Answer: ..."""
REPLY = re.compile(r"Question:[ \t]*(\S[^\n]{0,300})\n\s*Answer:[ \t]*(\S[^\n]{0,80})")


def read_sections(path):
    """(title, text) of a text file, or of each part of a Markdown file under a heading of its
    own."""
    sections, fenced = [(path.stem, [])], False
    for line in path.read_text("utf-8", errors="replace").splitlines():
        fenced ^= line.lstrip().startswith("```")
        if path.suffix.lower() != ".txt" and not fenced and re.match(r"#{1,6} ", line):
            sections.append((f"{path.stem}, {line.strip('# ')}", []))
        else:
            sections[-1][1].append(line)
    return [(title, "\n".join(lines)) for title, lines in sections]


def cut(text, most):
    """Passages of at most `most` characters: whole sentences where they fit,
    else cut between words, else anywhere."""
    passages = []
    for sentence in BREAK.split(text):
        for part in textwrap.wrap(" ".join(sentence.split()), most, break_on_hyphens=False):
            if passages and len(passages[-1]) + 1 + len(part) <= most:
                passages[-1] += f" {part}"
            else:
                passages.append(part)
    return passages


def cloze(rng, passage):
    """(question, answer): a sentence of the passage with a gap where a name or a number stood;
    None where none does."""
    sentences = map(str.strip, BREAK.split(passage["text"]))
    gaps = [(sentence, gap) for sentence in sentences for gap in GAP.finditer(sentence)]
    if not gaps:
        return None
    sentence, gap = rng.choice(gaps)
    return f"What is missing here? {sentence[: gap.start()]}___{sentence[gap.end() :]}", gap.group()


def parse_reply(reply, passage):
    """(question, answer) of a model's reply; None where it has none, or one that the passage does
    not hold or the question gives away."""
    found = REPLY.search(reply)
    if not found:
        return None
    question, answer = (part.strip() for part in found.groups())
    given = (
        holds_gold(passage["text"], [answer])
        and not holds_gold(question, [answer])
        and normalize_answer(answer)
    )
    return (question, answer) if given else None


@torch.inference_mode()
def ask(model_name, passages, batch_size=16):
    """The model's replies to REQUEST for each passage, greedy."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model_name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto").to(device).eval()
    for first in range(0, len(passages), batch_size):
        chats = [
            [{"role": "user", "content": REQUEST.format(**p)}]
            for p in passages[first : first + batch_size]
        ]
        texts = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            for chat in chats
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(
            device
        )
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, max_new_tokens=96, do_sample=False)
        yield from tokenizer.batch_decode(
            ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
        )
        print(f"{min(first + batch_size, len(passages))} of {len(passages)} passages", flush=True)


def hold_out(rng, ids, group_of):
    """About a tenth of the ids, at most half of them, in whole groups;
    none where the groups do not allow for that."""
    groups = {}
    for passage_id in ids:
        groups.setdefault(group_of(passage_id), []).append(passage_id)
    held_out = set()
    for name in rng.sample(sorted(groups), len(groups)):
        if len(held_out) < len(ids) / 10 and len(held_out) + len(groups[name]) <= len(ids) / 2:
            held_out |= set(groups[name])
    return held_out if len(held_out) >= len(ids) / 20 else set()


def write_texts(config):
    """The same three files from a folder of texts, with a question at most a passage. Held out are
    whole documents; or passages, where one document holds most of them."""
    rng = random.Random(config.seed)
    paths = sorted(
        path
        for path in config.from_texts.rglob("*")
        if path.suffix.lower() in TEXTS and path.is_file()
    )
    passages = [
        {"id": f"{path.relative_to(config.from_texts)}#{number}", "title": title, "text": passage}
        for path in paths
        for number, (title, passage) in enumerate(
            (title, passage)
            for title, text in read_sections(path)
            for passage in cut(text, config.passage_characters)
        )
    ]
    if not passages:
        fail(f"--from-texts {config.from_texts}: no text in files that end in {', '.join(TEXTS)}")
    if config.model_name:
        pairs = [
            parse_reply(reply, passage)
            for reply, passage in zip(ask(config.model_name, passages), passages)
        ]
    else:
        pairs = [cloze(rng, passage) for passage in passages]
    rows = [
        {"chunk_id": passage["id"], "question": pair[0], "answer": pair[1], "difficulty": "one_hop"}
        for passage, pair in zip(passages, pairs)
        if pair
    ]
    ids = [row["chunk_id"] for row in rows]
    held_out = hold_out(rng, ids, lambda row_id: row_id.rpartition("#")[0]) or hold_out(
        rng, ids, str
    )
    if not held_out:
        fail(
            f"{len(passages)} passages gave {len(rows)} questions: "
            "too few to train and hold out; add texts"
        )
    rng.shuffle(rows)
    write_rows(config.output / "corpus.jsonl", passages)
    write_rows(
        config.output / "questions.json", [row for row in rows if row["chunk_id"] not in held_out]
    )
    write_rows(
        config.output / "questions_eval.json", [row for row in rows if row["chunk_id"] in held_out]
    )


# ---------------------------------------------------------------- both
def write_rows(path, rows):
    """A list in JSON with a line for each row, or JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = (
        "[\n" + ",\n".join(lines) + "\n]\n" if path.suffix == ".json" else "\n".join([*lines, ""])
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="replace")
    print(f"{path}: {len(rows)} rows, {path.stat().st_size:,} bytes")


@dataclass
class Config:
    output: Path = OUTPUT  # a directory
    seed: int = 0
    passages: int = 3000  # of the invented world, one an entity; 15 % of them are held out
    questions: int = 2048  # of the invented world
    eval_questions: int = 512  # of the invented world
    # a directory with .md, .markdown and .txt files, in place of the invented world
    from_texts: Path | None = None
    # the causal LM that writes the questions; without one, sentences get a gap
    model_name: str | None = None
    passage_characters: int = 400  # at most, of a passage from texts


def main(config: Config):
    if config.from_texts and not config.from_texts.is_dir():
        fail(f"--from-texts {config.from_texts}: no such directory")
    for name in ("corpus.jsonl", "questions.json", "questions_eval.json"):
        if (config.output / name).exists() and (config.from_texts or config.output != OUTPUT):
            fail(f"--output {config.output}: {name} exists; choose another directory")
    (write_texts if config.from_texts else write_world)(config)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
