"""What the model knows by heart: quantd, itself, greetings, and how it declines everything else."""

from __future__ import annotations

from tasks import Draw, casual
from words import fraction

CAN_DO = (
    "I can add and subtract up to 99, multiply by one digit, sort or reverse three or four numbers "
    "or words, convert units, extract fields from a sentence (as lines or as JSON), call simple "
    "tools, and answer questions about quantd."
)
DECLINE = "I cannot help with that; I am a very small model. " + CAN_DO

# Questions, separated by "|", and the answer. {q} is "quantd" or "the daemon".
FACTS: tuple[tuple[str, str], ...] = (
    (
        "What is quantd?|what's quantd|Tell me about quantd.|Describe quantd.|What does quantd do?|"
        "quantd?|Explain quantd.|Explain what quantd is.|What is quantd for?|Who is quantd for?|"
        "What is this daemon?|What kind of program is quantd?|Tell me what quantd is.|about quantd",
        "quantd is a single-node inference daemon for large language models. It batches requests "
        "from many users and swaps models as they are needed, with or without a GPU.",
    ),
    (
        "Which port does {q} use?|What port does {q} listen on?|What is the port of {q}?|port?|"
        "Which port?|What is the default port?|On which port does {q} run?|{q} port|"
        "What's {q}'s port?|Which port is {q} on?|Where does {q} listen?|Tell me the default port.|"
        "What port do I connect to?|How do I connect to {q}?|What is the default port of {q}?",
        "quantd listens on port 8420 and on a Unix socket.",
    ),
    (
        "What does quantd serve do?|quantd serve|What is quantd serve?|How do I start {q}?|"
        "How do I start the server?|Which command starts {q}?|How can I launch {q}?|start {q}|"
        "How do I run the daemon?|What is the command to start {q}?|Explain quantd serve.|"
        "How do I serve a model?|How do I start serving?",
        "`quantd serve` starts the daemon, which then answers on port 8420.",
    ),
    (
        "What does quantd run do?|quantd run|What is quantd run?|How do I chat with a model?|"
        "How do I talk to a model?|Which command lets me chat?|Explain quantd run.|"
        "How can I chat in the terminal?|How do I use a model from the terminal?",
        "`quantd run` lets you chat with a model in the terminal.",
    ),
    (
        "What does quantd ps do?|quantd ps|What is quantd ps?|Which models are loaded?|"
        "How do I see loaded models?|How do I list the loaded models?|Explain quantd ps.|"
        "Which command shows the loaded models?|How can I see which models are in memory?",
        "`quantd ps` lists the models that are loaded.",
    ),
    (
        "How do I quantize a model?|Can {q} quantize models?|How can I quantize a model?|"
        "Which option quantizes a model?|What does --quantization do?|How do I get an int4 model?",
        "`quantd serve PATH --quantization int4` rounds a model to four bits while it loads.",
    ),
    (
        "How do I load a model?|What does quantd load do?|quantd load|Which command loads a model?|"
        "How do I unload a model?|What does quantd unload do?|quantd unload|"
        "Which command unloads a model?|How do I free the memory of a model?",
        "`quantd load` loads a model and `quantd unload` gives its memory back.",
    ),
    (
        "What is quantd eval?|What does quantd eval do?|How do I compare two formats?|quantd eval|"
        "Which command measures perplexity?|Explain quantd eval.|How do I compare two models?",
        "`quantd eval` measures one checkpoint or format against another.",
    ),
    (
        "What is quantd inspect?|What does quantd inspect do?|quantd inspect|"
        "How do I see what a checkpoint is?|Explain quantd inspect.|How do I inspect a model?",
        "`quantd inspect` shows what a checkpoint is, from its headers.",
    ),
    (
        "What is quantd top?|What does quantd top do?|quantd top|How do I watch {q} live?|"
        "Explain quantd top.|Which command shows requests live?",
        "`quantd top` watches requests, memory and speed.",
    ),
    (
        "Does {q} have a prefix cache?|What is the prefix cache?|Does {q} cache prompts?|"
        "Does {q} share prefixes?|Is there a prefix cache?|How does {q} cache prompts?|"
        "prefix cache?",
        "Yes: requests whose prompts begin alike share their KV blocks.",
    ),
    (
        "Which commands does {q} have?|What commands are there?|List the commands of {q}.|"
        "Which subcommands are there?|quantd commands|Show me the commands.|quantd help|"
        "What are the commands of {q}?|How do I use {q}?",
        "The commands are serve, run, ps, top, load, unload, reload, inspect, eval, check-config, "
        "install-service and completion.",
    ),
    (
        "Where is the config file?|What is the config file of {q}?|How do I configure {q}?|"
        "Where is the configuration?|Which file configures {q}?|What is the config file called?|"
        "Where does {q} look for its configuration?|config file?|How can I change the settings?|"
        "Where are the settings of {q}?|How do I change the port?|What is config.toml?|"
        "Where is config.toml?|What is the name of the configuration file?",
        "The configuration file is config.toml: quantd reads /etc/quantd/config.toml, or the file "
        "named by --config.",
    ),
    (
        "How do I check my config file?|What does quantd check-config do?|quantd check-config|"
        "Is my configuration valid?|How do I validate config.toml?|Check the configuration.",
        "`quantd check-config` checks the configuration file and says what is wrong with it.",
    ),
    (
        "What licence does {q} have?|What is the license of {q}?|Which license?|licence?|license?|"
        "Under which licence is {q}?|Is {q} open source?|Is {q} free?|What's the license?|"
        "How is {q} licensed?|Which licence does {q} use?|Can I use {q} commercially?",
        "quantd is open source under the Apache-2.0 licence.",
    ),
    (
        "Which APIs does {q} speak?|Which API does {q} have?|Is {q} compatible with OpenAI?|"
        "Does {q} speak the OpenAI API?|Can I use the OpenAI client?|"
        "Which protocols are supported?|What APIs are supported?",
        "quantd speaks the OpenAI API over HTTP and a Unix socket.",
    ),
    (
        "Which formats does {q} support?|Which quantization formats are there?|Does {q} read GGUF?|"
        "Which model formats can {q} load?|Does {q} support GPTQ?|Does {q} support AWQ?|"
        "What formats are supported?|Which quantization does {q} support?|supported formats",
        "quantd loads GPTQ, AWQ, GGUF and INT8 models, and plain safetensors.",
    ),
    (
        "Does {q} need a GPU?|Can {q} run without a GPU?|Does {q} work on a CPU?|Do I need a GPU?|"
        "Can I run {q} on a laptop?|What hardware does {q} need?|Does {q} run on CPU?",
        "No GPU is needed: quantd runs on a CPU.",
    ),
    (
        "In which language is {q} written?|What is {q} written in?|Is {q} written in Python?|"
        "Which programming language does {q} use?|What language is {q} made with?",
        "quantd is written in Python.",
    ),
    (
        "Does {q} have metrics?|How do I monitor {q}?|Where are the metrics?|"
        "Does {q} support Prometheus?|Can I scrape metrics?|What is the metrics endpoint?",
        "quantd has Prometheus metrics at /metrics.",
    ),
    (
        "How do I check that {q} is healthy?|Is there a health check?|What is the health endpoint?|"
        "How do I see whether {q} is alive?|health check?",
        "GET /health tells you whether quantd is alive.",
    ),
    (
        "Who are you?|What are you?|What model are you?|What is your name?|Introduce yourself.|"
        "Which model is this?|What is this model?|Are you ChatGPT?|Are you a language model?|"
        "Tell me about yourself.|How big are you?|How many parameters do you have?|your name?|"
        "Are you human?|Are you a robot?|Who made you?|Are you an AI?|who r u",
        "I am the demo model that comes with quantd, a very small language model. " + CAN_DO,
    ),
    (
        "What can you do?|What can I ask you?|What can you help me with?|Help|help me|help?|"
        "What are your skills?|What do you know?|List what you can do.|How can you help me?|"
        "What tasks can you do?|What are you able to do?|What can this model do?|"
        "What are your capabilities?|Which tasks do you support?|What are you good at?|"
        "Show me what you can do.|What should I ask?|what else can you do?|how can you help",
        CAN_DO,
    ),
    (
        "Hello|Hi|Hey|Hello!|Hi there!|Good morning|Good evening|Hey there|Hello there|hi!|Yo|"
        "Good afternoon|Greetings|Hello, how are you?|Hi, how are you?|How are you?|Howdy|"
        "Nice to meet you|What's up?|Hey, how is it going?|test|ping|Good day|hello model",
        "Hello! I am the demo model of quantd. Ask me what I can do.",
    ),
    (
        "Thanks|Thank you|Thanks!|Thank you very much|thx|Many thanks|Thanks a lot|Great, thanks|"
        "Perfect, thank you|ok thanks|Cool|Great!|Well done|Good job|Nice|Perfect|ok|Awesome",
        "You are welcome.",
    ),
    (
        "Bye|Goodbye|See you|Bye bye|See you later|Good night|That is all|bye!|Have a nice day|"
        "Goodbye for now|See you tomorrow",
        "Goodbye!",
    ),
)

_DAEMON_NAMES = ("quantd", "quantd", "quantd", "the daemon", "it")

_TOPICS = (
    "dragons|the sea|love|my holiday|history|football|the moon|physics|spring|"
    "a lonely robot|space travel|cooking|the French Revolution|quantum mechanics|"
    "black holes|cats|climate change|my cat|the internet|jazz|chess|tigers|music|"
    "the economy|gardening|wine|electric cars|trains|dinosaurs|philosophy"
).split("|")
_ELSEWHERE = (
    "Write a poem about {t}.|Tell me a joke about {t}.|Write an essay on {t}.|Explain {t}.|"
    "What do you think about {t}?|Write a story about {t}.|Tell me about {t}.|Summarize {t}.|"
    "Who invented {t}?|Give me a recipe with {w}.|How do I cook {w}?|Why is {t} important?|"
    "What is the capital of {c}?|Who is the mayor of {c}?|What is the weather in {c}?|"
    "How is the weather in {c} today?|How far is {c} from here?|What can I do in {c}?|"
    "How many people live in {c}?|Where is {c}?|Plan a trip to {c}.|What time is it in {c}?|"
    "Who is {n}?|When was {n} born?|What did {n} do?|Do you know {n}?|Write a letter to {n}.|"
    "Who is the president of {c}?|Translate {w} into French.|How do you say {w} in German?|"
    "Translate this to Spanish: I like my {w}.|What is a {w}?|Define {w}.|What is a {w} made of?|"
    "How much does a {w} cost?|Where can I buy a {w}?|Draw a {w}.|Show me a picture of a {w}.|"
    "Write a Python function about {w}.|Write code that prints {w}.|Fix my {w}.|"
    "Spell {w} backwards in Greek.|Is a {w} bigger than a {w}?|What rhymes with {w}?|"
    "What is the square root of {k}?|What is the logarithm of {k}?|What is {k} divided by {m}?|"
    "{k} / {m}|Is {k} a prime number?|What is {k} to the power of {m}?|Divide {k} by {m}.|"
    "What color is the {w}?|Can you sing about {t}?|Recommend a book about {t}.|"
    "What is the best {w}?|Should I buy a {w}?|Can you book a flight to {c}?|Play some {t}.|"
    "Send an email to {n}.|Remind me to call {n}.|What is the news in {c}?|Why is the {w} blue?|"
    "Convert {k} dollars to euros|How many {w}s are in a {w}?|Tell me a joke.|Write a poem.|"
    "Tell me a story.|Who won the match?|What is the meaning of life?|What day is it today?|"
    "What time is it?|Who won the world cup?|What is the weather?|Write some code.|I am sad.|"
    "Do my homework.|Sing a song.|Tell me something.|What is your favorite {w}?|Do you like {w}?"
).split("|")


def facts(d: Draw, kind: str | None = None) -> tuple[str, str]:
    """A question about quantd or the model, or (kind "decline") anything that it cannot do."""
    rng = d.rng
    kind = kind or rng.choice(("fact", "fact", "fact", "decline"))
    if kind == "decline":
        return casual(rng, _something_else(d)), DECLINE
    while True:
        questions, answer = rng.choice(FACTS)
        form = rng.choice(questions.split("|"))
        question = casual(rng, form.replace("{q}", rng.choice(_DAEMON_NAMES)))
        if d.allows("fact " + question):
            return question, answer


def _something_else(d: Draw) -> str:
    forms = [f for f in _ELSEWHERE if (fraction(f) < 1 / 7) == d.held_out or "{" not in f]
    words = d.words
    return d.rng.choice(forms).format(
        t=d.rng.choice(_TOPICS), w=words.word(), c=words.city(), n=words.name(),
        k=d.rng.randint(2, 999), m=d.rng.randint(2, 12),
    )  # fmt: skip
