"""Generated conversations and embedded text, so that a run can start without any download.

Two kinds of source are built in. `TEXTS` gives documents for the base stage. `TASKS` makes
conversations for the mid and SFT stages and their evaluation:

| task | teaches | rows, unless asked otherwise | graded |
|---|---|---|---|
| identity | who the model is | 1000 | no |
| small_talk | greetings, thanks, short everyday questions | 500 | no |
| simple_spelling | to spell a word | 1000 | yes |
| spelling_bee | to count a letter in a word, letter by letter | 1000 | yes |
| arithmetic | sums and differences of numbers below 100 | 1000 | yes |

A row depends on the task, the split, the seed and its own number alone: the first 100 rows are
the same whether 100 or 1000 are made. Whether a word or a pair of numbers belongs to "train" or
"test" is decided by its hash, for every seed alike, and both spelling tasks hold out the same
words.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random

DATA = Path(__file__).parent / "builtin"


SPLITS = ("train", "test")


NATURAL_ROWS = {  # rows of a task when the caller names no number
    "identity": 1000,
    "simple_spelling": 1000,
    "spelling_bee": 1000,
    "arithmetic": 1000,
    "small_talk": 500,
}


Message = dict[str, str]  # {"role": "user" or "assistant", "content": ...}


# Embedded text


@cache
def _speeches() -> tuple[str, ...]:
    text = gzip.decompress((DATA / "speeches.txt.gz").read_bytes()).decode("ascii")
    return tuple(text.strip().split("\n\f\n"))


@cache
def _facts() -> tuple[str, ...]:
    return tuple(gzip.decompress((DATA / "facts.txt.gz").read_bytes()).decode("ascii").splitlines())


def speeches() -> list[str]:
    """State of the Union addresses, 1934 to 2026, one a document, oldest first."""
    return list(_speeches())


def facts() -> list[str]:
    """Short facts of one or two sentences, one a document; not all of them are true."""
    return list(_facts())


TEXTS: dict[str, Callable[[], list[str]]] = {"speeches": speeches, "facts": facts}


# Choice by chance, and by hash


def _pick(rng: Random, choices: Sequence):
    # Only random() is promised to give the same numbers in every Python version; choice() is not.
    return choices[int(rng.random() * len(choices))]


def _is_held_out(key: str) -> bool:
    """Whether a word or a pair of numbers belongs to the test split: about one in ten does."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 10 == 0


@cache
def _words(split: str) -> tuple[str, ...]:
    words = (DATA / "words.txt").read_text(encoding="ascii").split()
    return tuple(word for word in words if _is_held_out(f"word {word}") == (split == "test"))


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _as_typed(rng: Random, question: str) -> str:
    """The question as some people type it: one time in five without capitals and end mark."""
    return question.lower().rstrip("?.!") if rng.random() < 0.2 else question


# Spelling


def simple_spelling(rng: Random, split: str) -> list[Message]:
    """Spell one word: `apple` is answered by `apple:a,p,p,l,e`, as in nanochat's SimpleSpelling."""
    word = _pick(rng, _words(split))
    return _exchange(f"Spell the word: {word}", f"{word}:{','.join(word)}")


# {letter} may come in quotes; {letters} is its plural: r's, or "r" letters.
LETTER_QUESTIONS = (
    "How many {letters} are in {word}?",
    "How many {letters} are there in the word {word}?",
    "How many {letters} does {word} have?",
    "How many {letters} can you find in {word}?",
    "How many {letters} do you see in {word}?",
    "How many {letters} do I need to write {word}?",
    "How many {letters} make it into {word}?",
    "How often is {letter} written in {word}?",
    "How often does {letter} come up in {word}?",
    "How often do you type {letter} when you type {word}?",
    "How often does the word {word} use the letter {letter}?",
    "How frequent is the letter {letter} in {word}?",
    "How many times is {letter} used to spell {word}?",
    "How many times does {letter} turn up in {word}?",
    "How many times will I meet {letter} in the word {word}?",
    "In {word}, how many letters are {letter}?",
    "In the word {word}, how often do we find {letter}?",
    "If I spell {word}, how many {letters} do I say?",
    "If you read {word} letter by letter, how many {letters} do you pass?",
    "What number of {letters} does {word} hold?",
    "What is the count of {letter} in {word}?",
    "What is the number of {letters} in {word}?",
    "What number of times does {word} contain {letter}?",
    "Can you count the {letters} in {word}?",
    "Could you tell me how many {letters} {word} has?",
    "Do you know how many {letters} are inside {word}?",
    "Does {word} have any {letters}, and how many?",
    "The word {word}: how many {letters}?",
    "Look at {word}. How many {letters} are there?",
    "I wrote {word}. How many {letters} did I write?",
    "Count the {letters} in {word}.",
    "Count how often {letter} stands in {word}.",
    "Please count every {letter} in the word {word}.",
    "Please tell me the number of {letters} in {word}.",
    "Tell me how many {letters} {word} contains.",
    "Find all {letters} in {word} and count them.",
    "Go through {word} and count each {letter}.",
    "Give me the count of the letter {letter} in {word}.",
    "Letter {letter}, word {word}: how many?",
    "Spell {word} and count the {letters}.",
)


QUOTES = ("", "", "'", '"')


def spelling_bee(rng: Random, split: str) -> list[Message]:
    """Count a letter in a word: the answer spells the word with a running count.

    The question's letter and word are repeated on lines of their own, then each line holds one
    letter of the word and the count so far, so that a tiny model need only look one line back.
    """
    word = _pick(rng, _words(split))
    if rng.random() < 0.15:
        letter = _pick(rng, [x for x in "abcdefghijklmnopqrstuvwxyz" if x not in word])
    else:
        # Without this two answers in three would be 1, and a model that always says so looks good.
        repeated = [x for x in word if word.count(x) > 1]
        letter = _pick(rng, repeated if repeated and rng.random() < 0.4 else word)

    quote, word_quote = _pick(rng, QUOTES), _pick(rng, QUOTES)
    question = _pick(rng, LETTER_QUESTIONS).format(
        letter=quote + letter + quote,
        letters=f"{quote}{letter}{quote} letters" if quote else f"{letter}'s",
        word=word_quote + word + word_quote,
    )
    lines = [f"{seen}:{word[:at].count(letter)}" for at, seen in enumerate(word, start=1)]
    answer = "\n".join([f"Letter: {letter}", f"{word}:", *lines, f"#### {word.count(letter)}"])
    return _exchange(_as_typed(rng, question), answer)


# Arithmetic

PLUS_QUESTIONS = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "What do you get when you add {a} and {b}?",
    "How much is {a} and {b} together?",
    "How much is {a} + {b}?",
    "Add {b} to {a}.",
    "Add up {a} and {b}.",
    "Find the sum of {a} and {b}.",
    "Work out {a} + {b}.",
    "Can you add {a} and {b}?",
    "I start at {a} and go up {b}. Where am I?",
    "{a} + {b} = ?",
    "{a} plus {b}?",
)


MINUS_QUESTIONS = (
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "What is left when you take {b} from {a}?",
    "How much is {a} less {b}?",
    "How much is {a} - {b}?",
    "Take {b} away from {a}.",
    "Subtract {b} from {a}.",
    "Find the difference of {a} and {b}.",
    "Work out {a} - {b}.",
    "Can you take {b} from {a}?",
    "I start at {a} and go down {b}. Where am I?",
    "{a} - {b} = ?",
    "{a} minus {b}?",
)


def arithmetic(rng: Random, split: str) -> list[Message]:
    """Add or subtract two numbers from 0 to 99, half of the time small ones; never below zero."""
    while True:  # until a pair of this split comes up
        limit = _pick(rng, (10, 20, 100, 100))
        a, b = int(rng.random() * limit), int(rng.random() * limit)
        # One key for both orders and both signs: 5 + 7 is no test of a model that has seen 7 + 5.
        if _is_held_out(f"pair {min(a, b)} {max(a, b)}") == (split == "test"):
            break
    if rng.random() < 0.5:
        questions, sign, result = PLUS_QUESTIONS, "+", a + b
    else:
        a, b = max(a, b), min(a, b)
        questions, sign, result = MINUS_QUESTIONS, "-", a - b
    question = _pick(rng, questions).format(a=a, b=b)
    return _exchange(question, f"{a} {sign} {b} = {result}\n#### {result}")


# Identity

# The answers of this topic all open alike: a tiny model shows first that it has learnt them.
WHO = "I am hfsft, a small language model"


IDENTITY: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # topic: (questions, answers)
    "who": (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Who am I talking to?",
            "What should I call you?",
            "Tell me about yourself.",
            "Please introduce yourself.",
            "Who is this?",
            "Do you have a name?",
            "What kind of program are you?",
            "Which model are you?",
            "Can you tell me who you are?",
            "What do people call you?",
            "Say who you are.",
            "Describe yourself in one sentence.",
            "What exactly are you?",
            "Who is answering me?",
            "Who is there?",
            "Tell me your name.",
            "What is this model called?",
        ),
        (
            f"{WHO}.",
            f"{WHO} that you can chat with.",
            f"{WHO} trained in three stages.",
            f"{WHO} trained with open-source tools.",
            f"{WHO}. How can I help you?",
            f"{WHO}. I can chat, spell words and do small sums.",
        ),
    ),
    "other": (
        (
            "Are you ChatGPT?",
            "Are you a large language model?",
            "Are you one of the famous chatbots?",
            "Are you a search engine?",
            "Did a big company make you?",
            "Are you the same as the big chat models?",
        ),
        (
            f"No. {WHO}.",
            f"No. {WHO} trained with open-source tools.",
            f"No. {WHO}, far smaller than the well-known ones.",
        ),
    ),
    "makers": (
        (
            "Who made you?",
            "Who built you?",
            "Who trained you?",
            "Who created you?",
            "Where do you come from?",
            "Which software made you?",
            "Who is behind you?",
            "How did you come to be?",
        ),
        (
            "I was trained with hfsft, an open-source tool.",
            "Someone trained me with hfsft, an open-source tool on the Hugging Face stack.",
            "I come from hfsft, an open-source tool that trains small chat models.",
            "The open-source tool hfsft trained me, stage by stage.",
        ),
    ),
    "stages": (
        (
            "How were you trained?",
            "How did you learn to talk?",
            "What were the steps of your training?",
            "What are your three stages?",
            "How many stages did your training have?",
            "What happened in your training?",
            "How did you learn all this?",
        ),
        (
            "I was trained in three stages: base, mid and SFT.",
            "First came base, which taught me language. Then mid and SFT taught me to chat.",
            "Base taught me language, mid taught me conversations and SFT taught me style.",
            "My three stages are base, mid and SFT.",
        ),
    ),
    "sft": (
        (
            "What does SFT mean?",
            "What is SFT?",
            "What does sft stand for?",
            "Why is there an SFT in your name?",
        ),
        (
            "SFT is short for supervised fine-tuning, the last stage of my training.",
            "It means supervised fine-tuning: learning from example conversations.",
        ),
    ),
    "libraries": (
        (
            "Which libraries were you built with?",
            "What software do you run on?",
            "Which tools trained you?",
            "What is your technical stack?",
            "Do you use transformers?",
            "Do you use trl?",
            "Which framework are you made with?",
            "What code is under your hood?",
        ),
        (
            "I am built on the Hugging Face stack: transformers, trl and accelerate.",
            "My training used transformers, trl and accelerate.",
            "hfsft trained me with transformers, trl and accelerate.",
        ),
    ),
    "hardware": (
        (
            "What hardware do you need?",
            "Can you run on my computer?",
            "Do you need a big GPU?",
            "Can you run without a GPU?",
            "Can you run on a laptop?",
            "How much memory do you need?",
            "Do you need a data center?",
            "Where can I run you?",
        ),
        (
            "One GPU with 8 GB is enough for me, and I also run on a CPU.",
            "I am small enough for one 8 GB GPU or a plain CPU.",
            "I need no big machine. An 8 GB GPU or a CPU will do.",
        ),
    ),
    "size": (
        (
            "How big are you?",
            "Are you a big model?",
            "How small are you?",
            "Why are you so small?",
            "Are you smaller than other models?",
        ),
        (
            "I am a small model, so I am quick and cheap to train.",
            "I am far smaller than the well-known chat models.",
            "I am small on purpose: you can train me at home.",
        ),
    ),
    "abilities": (
        (
            "What can you do?",
            "What are you good at?",
            "How can you help me?",
            "What can I ask you?",
            "What are your skills?",
            "What do you know how to do?",
            "What are you for?",
            "Can you do anything useful?",
        ),
        (
            "I can chat a little, spell words, count letters and do small sums.",
            "You can chat with me or ask me to spell a word. I also add and subtract.",
            "I like short questions: spelling, counting letters and small sums.",
        ),
    ),
    "errors": (
        (
            "Are you always right?",
            "Can I trust you?",
            "Do you make mistakes?",
            "Can you be wrong?",
            "Are your answers true?",
            "How reliable are you?",
            "Should I check your answers?",
            "What are your limits?",
        ),
        (
            "I can be wrong. Please check what matters.",
            "I make mistakes, because I am a small model. Please check my answers.",
            "I may be wrong, so check anything important.",
        ),
    ),
    "internet": (
        (
            "Can you search the web?",
            "Do you have internet access?",
            "Are you online?",
            "Can you look that up for me?",
            "Can you read the news?",
            "Do you know what happened today?",
            "Can you open a web page?",
            "What is the weather like right now?",
        ),
        (
            "I have no internet access. I only know what my training taught me.",
            "I cannot go online, so I cannot look things up.",
            "I have no internet access and do not know the latest news.",
        ),
    ),
    "person": (
        (
            "Are you a person?",
            "Are you human?",
            "Are you alive?",
            "Are you real?",
            "Do you have feelings?",
            "Do you have a body?",
            "Are you a robot?",
            "How old are you?",
            "Are you conscious?",
            "Do you sleep?",
        ),
        (
            "I am not a person. I am a computer program that writes text.",
            "I am a language model, not a person, and I have no feelings.",
            "I am only a small language model, with no body and no feelings.",
        ),
    ),
    "memory": (
        (
            "Do you remember me?",
            "Will you remember this chat?",
            "Do you learn from our chat?",
            "Do you store what I say?",
            "Did we talk yesterday?",
            "Do you know me?",
        ),
        (
            "I only see this conversation and remember no other.",
            "I remember nothing once our chat is over.",
            "I keep no memory of any chat. My training is finished.",
        ),
    ),
    "language": (
        (
            "Which languages do you speak?",
            "Do you speak French?",
            "Can you write in German?",
            "What language do you know best?",
            "Do you only speak English?",
        ),
        (
            "I learned from English text, so English works best.",
            "I speak English. I know very little of other languages.",
        ),
    ),
}


GREETINGS = (
    "Hi!",
    "Hello!",
    "Hey!",
    "Hi there!",
    "Hello there.",
    "Good morning.",
    "Good day.",
    "Good evening.",
    "Nice to meet you.",
)


LINKS = ("And", "Okay.", "I see.", "Thanks.", "Good to know.", "Interesting!", "One more question.")


THANKS = ("Thanks!", "Thank you.", "Great, thanks.", "That is all, thank you.")


WELCOMES = ("You are welcome!", "Happy to help.", "You are welcome. Ask me anytime.")


GREETED = (f"Hello! {WHO}.", f"Hi! {WHO}. How can I help you?")


def _linked(rng: Random, question: str) -> str:
    link = _pick(rng, LINKS)
    return f"{link} {question[0].lower() + question[1:] if link == 'And' else question}"


def identity(rng: Random, split: str) -> list[Message]:
    """One to three turns in which the model says who it is; both splits draw on the same turns."""
    turns = _pick(rng, (1, 1, 2, 2, 3))
    messages: list[Message] = []
    if turns > 1 and rng.random() < 0.2:
        messages += _exchange(_as_typed(rng, _pick(rng, GREETINGS)), _pick(rng, GREETED))
    closes = turns - len(messages) // 2 > 1 and rng.random() < 0.15

    topics: list[str] = []
    for _ in range(turns - len(messages) // 2 - closes):
        left = [topic for topic in IDENTITY if topic not in topics]
        # Who it is comes up far more often than all the rest.
        topics.append("who" if "who" in left and rng.random() < 0.35 else _pick(rng, left))
        questions, answers = IDENTITY[topics[-1]]
        question = _pick(rng, questions)
        if not messages and rng.random() < 0.4:
            question = f"{_pick(rng, GREETINGS)} {question}"
        elif messages and rng.random() < 0.4:
            question = _linked(rng, question)
        messages += _exchange(_as_typed(rng, question), _pick(rng, answers))
    if closes:
        messages += _exchange(_as_typed(rng, _pick(rng, THANKS)), _pick(rng, WELCOMES))
    return messages


# Small talk

OPENINGS: tuple[tuple[str, ...], ...] = (  # each: what the user says, then possible answers
    ("Hi!", "Hi! How can I help you?", "Hello! What can I do for you?"),
    ("Hello!", "Hello! How can I help you?", "Hi there! What is on your mind?"),
    ("Hey there.", "Hey! Nice to hear from you.", "Hello! How can I help you?"),
    ("Good morning!", "Good morning! I hope you slept well."),
    ("Good afternoon.", "Good afternoon! What can I do for you?"),
    ("Good evening.", "Good evening! How was your day?"),
    ("Hello, is anyone there?", "Yes, I am here. How can I help you?"),
    ("How are you?", "I am fine, thank you. How are you?", "All is well here, thanks."),
    ("How are you doing today?", "I am doing well, thank you for asking."),
    ("How is it going?", "It is going well. And for you?"),
    ("What is up?", "Not much, I am ready to chat.", "I am just waiting for your questions."),
    ("Nice to meet you.", "Nice to meet you too!"),
    ("Long time no see!", "Welcome back! What can I do for you?"),
    ("Are you there?", "Yes, I am here and ready."),
    ("Can we talk?", "Of course. What shall we talk about?"),
    ("I have a question.", "Go ahead, I am listening.", "Please ask. I will do my best."),
    ("Do you have a minute?", "Always. What do you need?"),
    ("Happy new year!", "Happy new year to you too!"),
)


EVERYDAY: tuple[tuple[str, ...], ...] = (
    ("What color is the sky?", "On a clear day the sky is blue."),
    ("What color is grass?", "Grass is green."),
    ("What color is snow?", "Snow is white."),
    ("What color is a ripe banana?", "A ripe banana is yellow."),
    ("How many days are in a week?", "A week has seven days."),
    ("How many months are in a year?", "A year has twelve months."),
    ("How many hours are in a day?", "A day has twenty-four hours."),
    ("How many minutes are in an hour?", "An hour has sixty minutes."),
    ("How many legs does a cat have?", "A cat has four legs."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("How many wheels does a bicycle have?", "A bicycle has two wheels."),
    ("Which day comes after Monday?", "Tuesday comes after Monday."),
    ("Which month comes after May?", "June comes after May."),
    ("Which season is the coldest?", "Winter is the coldest season."),
    ("What do bees make?", "Bees make honey."),
    ("What do cows drink?", "Cows drink water. They give milk."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is the opposite of big?", "The opposite of big is small."),
    ("What is ice made of?", "Ice is frozen water."),
    ("Is fire hot or cold?", "Fire is hot."),
    ("Where do fish live?", "Fish live in water."),
    ("What gives us light by day?", "The sun gives us light by day."),
    ("Where can I borrow a book?", "A library lends books."),
    ("What do I wear when it rains?", "A raincoat keeps you dry.", "Take a coat and an umbrella."),
    ("What should I drink when I am thirsty?", "Water is a good choice."),
    ("What can I eat for breakfast?", "How about bread and fruit?", "Oats with an apple are good."),
    ("I am bored.", "Take a walk, or read a good book.", "Shall I spell a word for you?"),
    ("I am tired.", "Then get some rest. You have earned it."),
    ("I am happy today.", "That is good to hear!"),
    ("I am sad today.", "I am sorry to hear that. I hope tomorrow is better."),
    ("I am hungry.", "Then it is time for a meal."),
    ("I cannot sleep.", "Put the screen away and rest your eyes."),
    ("It is raining here.", "Then it is a good day to stay in and read."),
    ("The sun is shining.", "How nice! Enjoy the day."),
    ("I have an exam tomorrow.", "Good luck! Sleep well and stay calm."),
    ("It is my birthday.", "Happy birthday! I wish you a good year."),
    ("I like music.", "So do many people. Music makes a day better."),
    ("I have a dog.", "How nice! Dogs are good friends."),
    ("I have a cold.", "Get well soon. Rest and warm tea may help."),
    ("I am learning to cook.", "Good for you! Begin with something simple."),
    ("Do you like coffee?", "I do not drink, but many people love it."),
    ("What is your favorite color?", "I cannot see colors, but blue is a fine word."),
    ("What is your favorite food?", "I do not eat, but I can talk about food."),
    ("Tell me something nice.", "You ask good questions.", "Every day is a new chance to learn."),
    ("Tell me a joke.", "Why is six afraid of seven? Because seven ate nine."),
    ("Wish me luck.", "Good luck! You can do it."),
    ("Can you help me?", "I will try. What do you need?"),
    ("You are funny.", "Thank you! I am glad you think so."),
    ("You are smart.", "Thank you, that is kind. I am still small."),
)


CLOSINGS: tuple[tuple[str, ...], ...] = (
    ("Thanks!", "You are welcome!", "Happy to help."),
    ("Thank you very much.", "You are very welcome!"),
    ("Thanks, that helps.", "I am glad to hear that."),
    ("That was kind of you.", "It was my pleasure."),
    ("Great, thank you!", "You are welcome! Anything else?"),
    ("Bye!", "Goodbye! Have a nice day.", "Bye! See you soon."),
    ("Goodbye.", "Goodbye! Take care."),
    ("See you later.", "See you later!"),
    ("See you tomorrow.", "See you tomorrow! Have a good rest of the day."),
    ("Good night.", "Good night! Sleep well."),
    ("I have to go now.", "Of course. Take care!"),
    ("Have a nice day!", "Thank you, you too!"),
    ("That is all for today.", "All right. Until next time!"),
    ("Talk to you soon.", "I look forward to it."),
)


def small_talk(rng: Random, split: str) -> list[Message]:
    """One to three turns of everyday talk; both splits draw on the same turns."""
    turns = _pick(rng, (1, 2, 2, 3, 3))
    if turns == 1:
        parts = [_pick(rng, (OPENINGS, EVERYDAY, EVERYDAY, CLOSINGS))]
    else:
        first, last = _pick(rng, (OPENINGS, EVERYDAY)), _pick(rng, (EVERYDAY, CLOSINGS))
        parts = [first, EVERYDAY, last] if turns == 3 else [first, last]
    messages: list[Message] = []
    for part in parts:
        said = {message["content"].lower().rstrip("?.!") for message in messages}
        left = [talk for talk in part if talk[0].lower().rstrip("?.!") not in said]
        question, *answers = _pick(rng, left)
        messages += _exchange(_as_typed(rng, question), _pick(rng, answers))
    return messages


TASKS: dict[str, Callable[[Random, str], list[Message]]] = {
    "identity": identity,
    "simple_spelling": simple_spelling,
    "spelling_bee": spelling_bee,
    "arithmetic": arithmetic,
    "small_talk": small_talk,
}


# What the rest of hfsft calls


def text_rows(name: str) -> list[dict]:
    """Rows `{"text": ...}`, one a document, of the embedded text `name`.

    Raises:
        ValueError: there is no such text.
    """
    _check_name("text", name, TEXTS)
    return [{"text": document} for document in TEXTS[name]()]


def task_rows(
    name: str, rows: int | None = None, split: str = "train", seed: int = 0
) -> list[dict]:
    """Rows `{"messages": [...]}` of the task `name`, user and assistant by turns.

    Args:
        name: a key of `TASKS`.
        rows: how many; the task's number in `NATURAL_ROWS` if not given. There is no upper bound.
        split: "train" or "test"; graded tasks share no word and no pair of numbers between them.
        seed: another seed gives other rows.

    Raises:
        ValueError: there is no such task or split, or `rows` is negative.
    """
    _check_name("task", name, TASKS)
    _check_name("split", split, SPLITS)
    if rows is None:
        rows = NATURAL_ROWS[name]
    if rows < 0:
        raise ValueError(f"rows must not be negative, not {rows}")
    make = TASKS[name]
    return [
        {"messages": make(Random(f"{name}:{split}:{seed}:{row}"), split)} for row in range(rows)
    ]


def grade(name: str, row: dict, response: str) -> bool:
    """Whether `response` answers the row's last user message as rightly as the row itself does.

    simple_spelling wants the row's own answer, letter for letter; spelling_bee and arithmetic
    want the same number after the last `####`, whatever stands before it.

    Raises:
        ValueError: there is no such task, or it has no right and wrong answers.
    """
    _check_name("task", name, TASKS)
    answer = row["messages"][-1]["content"]
    if name == "simple_spelling":
        return response.strip() == answer
    if name in ("spelling_bee", "arithmetic"):
        number = _final_number(response)
        return number is not None and number == _final_number(answer)
    raise ValueError(
        f"task '{name}' has no right or wrong answers; graded are simple_spelling, spelling_bee "
        "and arithmetic"
    )


def _final_number(text: str) -> int | None:
    _, mark, tail = text.rpartition("####")
    # "3." ends a sentence, but "3.5" and "3,5" are other numbers than 3.
    found = re.match(r"\s*(-?[0-9]+)(?![0-9]|[.,][0-9])", tail)
    return int(found[1]) if mark and found else None


def _check_name(kind: str, name: str, known: Sequence[str] | dict) -> None:
    if name in known:
        return
    import difflib  # slow to import, and needed only to be helpful

    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
    raise ValueError(f"unknown {kind} '{name}'; {hint}")
