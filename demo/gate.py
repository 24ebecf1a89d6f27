"""Hand-written questions that training never sees: the gate of the demo model.

One line a conversation: turns separated by ` / `, then ` => ` and the intents whose answer is right for the
last turn, separated by ` | `.  Intents are named as in `intents.py` (`topic.aspect`, `command.aspect`, a free
intent, or `unknown` for "I do not know that").

`OPEN` was read while the wordings were improved, so its score flatters a little.  `BLIND` was written at the
same time, before the wordings, and scored only after the last training run.  `corpus.py` drops every question
that is in `held_out()`, whatever its case and punctuation.  `BASIC` is what everybody types first; training
sees those words, and a miss there would be plainly broken.
"""

import re

BASIC = """
hello => greet
Hi! => greet
what is an expert? => expert.what
What is a router? => router.what
what is prefetch? => prefetch.what
what is quantization => quant.what
what is Mixtral? => mixtral.what
what is moe-local? => moelocal.what
What can you do? => can
who are you? => name
thanks => thanks
Thank you! => thanks
bye => bye
why? => clarify
tell me a joke => joke
how are you? => wellbeing
help => can
""".strip()

OPEN = """
So tell me, what on earth is a mixture of experts? => moe.what | moe.how
what makes an MoE model special compared to other models? => moe.what | moe.why | dense_vs_moe
why would somebody build an MoE instead of a normal network? => moe.why | dense_vs_moe
what do people mean when they say expert? => expert.what
is an expert just a small neural network? => expert.what | expert.how
what role do experts play in a model => expert.what | expert.why | expert.how
who decides which expert gets used? => router.what | router.how
how are the experts chosen for a token? => router.how | router.what | moe.how | topk.how
What's the job of the router? => router.what | router.why | router.how
how does the routing work in detail => router.how
what does top-k stand for? => topk.what
Why is load balancing needed? => balance.why | balance_event
what happens if one expert receives all the tokens => balance_event | balance.why | balance.what
how does the cache work => cache.how | cache.what
How does the LRU cache of experts work? => cache.how | cache.what
what gets thrown out when the cache is full? => cache_full | eviction.what | eviction.how
why do you cache experts at all => cache.why
What is meant by hit rate? => hit.what | hit.how
what happens when an expert is not in VRAM? => miss_event | miss.what | miss.how
what happens on a cache miss? => miss_event | miss.how | miss.what
why do stalls hurt so much => miss.why
why does prefetch help => prefetch.why
what is prefetching good for => prefetch.why
how can it know which experts come next? => prefetch.how | prefetch.what
what if the prefetch guesses the wrong expert? => prefetch_wrong
Could you explain what quantization does to a model? => quant.what | quant.how
why quantize the experts? => quant.why
How many bits does NF4 use for a weight? => nf4.what | nf4.how | nf4.example
what is VRAM and why do I need so much of it => vram.what | vram.why
what is the use of pinned memory? => ram.what | ram.why
can the experts live on my SSD? => disk.what | disk.how | disk.why | disk.example
how fast is PCIe? => pcie.what | pcie.example | pcie.how | pcie.why
What does offloading mean? => offload.what
is offloading worth it? => offload.why | offload.what
what's stored in the KV cache? => kv.what | kv.how
what is a token anyway => token.what
What does attention do in a transformer? => attention.what | attention.how
what's the context length about? => context.what
tell me something about Mixtral 8x7B => mixtral.what
how big is the mixtral model really? => mixtral_size | mixtral.what
how many experts are there in mixtral? => mixtral_experts | mixtral.what
what can you say about Qwen3-30B-A3B => qwen.what
is deepseek v3 a big model? => deepseek.what | deepseek.why | deepseek_size
Tell me about the model from OpenAI, gpt-oss => gptoss.what
should perplexity be high or low? => ppl.what | ppl.how
how many tokens per second will I get => speed.what | speed.how | speed.example
Is safetensors safe? => safetensors.what | safetensors.why
what's moe-local all about => moelocal.what | moelocal.why
How do I begin a chat with Mixtral? => chat.what | chat.example | mixtral.example
which command opens a conversation => chat.what
how do I ask a single question from a shell script? => run.what | run.example
how can I tell if a model will fit on my card? => fit.what | fit.example
will mixtral fit on my 12 GB card? => fit.what | fit.example
how do I measure tokens per second on my machine? => bench.what | bench.example | speed.how
I want an OpenAI compatible server => serve.what | serve.example
how do I download mixtral? => pull.what | pull.example
How can I delete a model I no longer need? => rm.what | rm.example
which models do I have on disk? => list.what | list.example
how do I turn a model into 4 bits? => convert.what | convert.example
something is broken on my system, what now? => doctor.what | doctor.example
how do I see how many layers a model has? => show.what | show.example
Hello, nice to meet you! => greet
hey hey => greet
How's it going today? => wellbeing
thanks a bunch => thanks
ok bye for now => bye
who exactly are you? => name
what sort of things can you tell me about? => can
are you a human being? => human
how many parameters are inside you? => size
who trained you and on what? => made
do you ever make mistakes? => trust
know any good jokes? => joke
you're doing great => praise
that answer was wrong => blame
how do I install this thing? => install
can I use moe-local in a Python program? => python
what are the available commands? => commands
why is the generation so slow on my pc? => slow | slow_fix
I keep getting out of memory errors => oom
can it run without any graphics card => nogpu
does the cache change what the model says? => exact
do my chats leave my computer? => private
what's better, a dense model or an MoE? => dense_vs_moe
does every expert know a different subject? => specialists
which model would you recommend for a 24 GB card? => which_model
what is the difference between a hit and a miss? => hit_vs_miss | hit+miss
how is RAM different from VRAM? => ram_vs_vram | ram+vram
can I use a GGUF file? => gguf
where are the converted files stored? => where_files
does it work on a Mac? => hardware
can I fine-tune a model with it? => finetune
Who is the president of the United States? => unknown
what is the capital of Norway? => unknown
how do I bake a chocolate cake? => unknown
what is 12 times 8? => unknown
Who painted the Mona Lisa? => unknown
recommend a good restaurant in Rome => unknown
what is a flugelhorn? => unknown
write me a haiku about autumn => unknown
how does a diesel engine work? => unknown
what is the best programming language? => unknown
how do I fix my bicycle => unknown
xqzt blorp fnord => unknown | clarify
what's the weather like tomorrow? => unknown
what is a router? / why does it matter? => router.why
what is prefetch / ok and how does it work? => prefetch.how
Tell me about NF4. / can you give an example of that? => nf4.example
what is an expert? / could you show me an example? => expert.example
hi / what is an LRU cache? / how does that work exactly? => cache.how
What is quantization? / what's the benefit of that? => quant.why
what is the kv cache? / why do I need it? => kv.why
what is top-k? / thanks => thanks
tell me about mixtral / how much memory does it need? => mixtral_size
how do I download mixtral? / thanks a lot! => thanks
why does prefetch help? / give me an example => prefetch.example
who won the world cup? / ok, then what is an expert? => expert.what
what is a cache miss? / why? => miss.why
hello / how are you? => wellbeing
what is an expert / bye => bye
what is moe-local serve? / give me an example => serve.example
""".strip()

BLIND = """
can you tell me in a few words what MoE means? => moe.what
what is the big advantage of mixture-of-experts models? => moe.why
describe what goes on inside an MoE layer => moe.how | moe.what
what exactly does a single expert compute? => expert.how | expert.what
what part of the network picks the experts? => router.what | router.how | moe.how
does the router matter a lot? => router.why
why only two experts per token and not all eight? => topk.why | topk.what | moe.why | mixtral_experts
how do you keep the router from always using the same expert? => balance.what | balance.how | balance.why
please explain the expert cache to me => cache.what | cache.how
what does least recently used mean? => cache.what | cache.how | eviction.what | lru_vs_lfu
when does an expert get evicted? => eviction.what | eviction.how | cache_full
is a high hit rate good? => hit.why | hit.what | hit.how
how expensive is a miss? => miss.why | miss.example | miss.how | miss.what
and if the expert I need is still on disk? => disk.how | disk.what | miss_event | disk.example
tell me how prefetching works please => prefetch.how
does a bad prefetch slow everything down? => prefetch_wrong
what do I gain by quantizing? => quant.why
does quantization hurt the quality? => quant_quality | quant.why | ppl.why | nf4.why
in what format are the experts kept? => nf4.what | expert_file.what | quant.how | convert.what | moelocal.how
why is graphics memory so important here? => vram.why
why must the memory be pinned? => ram.why | ram.what
what is the slowest link between RAM and the GPU? => pcie.what | pcie.why
how come a model larger than my card can run at all? => offload.why | offload.how | offload.what | moelocal.how
does a long conversation use more memory? => kv.why | kv.how | context.why | context.what | context_long
how is text cut into tokens? => token.how | token.what
what do attention layers do? => attention.what | attention.how
can you describe Mixtral? => mixtral.what
how much VRAM does mixtral 8x7b want? => mixtral_size | fit.what | fit.example
how many experts does Qwen3 use? => qwen.what | qwen.how | qwen_size
will DeepSeek run on my laptop? => deepseek.what | deepseek.example | deepseek.why | fit.what | deepseek_size
who made gpt-oss? => gptoss.what
what does it mean if perplexity goes up? => ppl.what | ppl.why | ppl.example
how fast does it generate text? => speed.what | speed.example | speed.how
what is a slot in the cache? => slot.what
why not use pickle files? => safetensors.why | safetensors.what
what is this program for? => moelocal.what | moelocal.why
how can I talk to a model in my terminal? => chat.what | chat.example
is there a command for one prompt only? => run.what | run.example
can I check the memory before I download a model? => fit.what | fit.example
is there a benchmark? => bench.what | bench.example
how do I connect my chat app to moe-local? => serve.what | serve.example
get qwen3 onto my machine => pull.what | pull.example
free some disk space, I have too many models => rm.what | rm.example
show me all models that are installed => list.what | list.example
what is the doctor command for? => doctor.what
what does moe-local convert do? => convert.what
how do I delete mixtral from my disk? => rm.what | rm.example
how do I benchmark qwen3? => bench.what | bench.example
hi demo, good to see you => greet
how are you feeling this morning? => wellbeing
thank you so much for the help => thanks
I must leave now, goodbye => bye
what should I call you? => name
what topics do you understand? => can
are you a machine or a person? => human
how large is this demo? => size
where does your knowledge come from? => made
can I rely on what you say? => trust
please tell me something funny => joke
wow, that was a great explanation => praise
no, you got that wrong => blame
I had a terrible day => sad
how do I set moe-local up on my computer? => install
how would I call it from Python code? => python
I am new here, where should I start? => start | commands | can
my output is far too slow, what can I do? => slow | slow_fix
CUDA says it is out of memory => oom
I don't own a GPU, is that a problem? => nogpu
are the answers the same with offloading? => exact
do you need an internet connection? => private
is LFU better than LRU? => lru_vs_lfu
which model fits on 8 GB? => which_model | fit.what | fit.example
what if the whole model fits in VRAM? => fits_all
does it support AMD cards? => hardware
is moe-local free? => license
which languages do you speak? => language
Who wrote Hamlet? => unknown
what's the tallest mountain on earth? => unknown
how many legs does a spider have? => unknown
can you translate good morning into Spanish? => unknown
what should I cook tonight? => unknown
who is your favourite singer? => unknown
what is the square root of 144? => unknown
asdf jkl qwerty => unknown | clarify
how do vaccines work? => unknown
tell me about the Roman Empire => unknown
book me a flight to Tokyo => unknown
what is an LRU cache? / and why is it useful? => cache.why
explain offloading / do you have an example? => offload.example
hello there / what is NF4? / how does it work? => nf4.how
what does the router do? / great, thank you! => thanks
what is PCIe? / why is that a problem? => pcie.why
tell me a joke / another one => joke
how do I start a server? / could you give an example? => serve.example
what is a flugelhorn? / why not? => unknown_why | unknown
what is a token? / ok / what is attention? => attention.what
tell me about qwen3 / how do I download it? => pull.what | pull.example
what is prefetch? / see you later => bye
""".strip()


def normalize(question: str) -> str:
    """`question` in lower case, without punctuation or doubled spaces: what two equal questions share."""
    return " ".join(re.sub(r"[^a-z0-9 -]", " ", question.lower().replace("'", "")).split())


def conversations(table: str) -> list[tuple[list[str], list[str]]]:
    """(user turns, accepted intents) of every line of `table`."""
    rows = []
    for line in table.splitlines():
        turns, _, intents = line.partition(" => ")
        rows.append((turns.split(" / "), intents.split(" | ")))
    return rows


def held_out() -> frozenset[str]:
    """Normalized questions that training must not contain: all that stand alone, and longer last turns."""
    questions = set()
    for turns, _ in conversations(OPEN) + conversations(BLIND):
        if len(turns) == 1 or len(turns[-1].split()) >= 5:
            questions.add(normalize(turns[-1]))
    return frozenset(questions)
