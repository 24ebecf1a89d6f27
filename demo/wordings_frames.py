"""Question frames that fit every topic or command, and what is put around them.

Patterns are `;`-separated, `(a|b|)` is a choice, `{t}` a topic's name, `{a}` something a user wants to do, `{c}`
a command's name, `{n}` a thing the demo knows nothing about, `{x}` and `{y}` small numbers.
"""

# Questions about a topic, by the aspect they ask for.
TOPIC_FRAMES = {
    "what": """
(what is|what's|whats|what are|explain|define|describe|tell me about|tell me|meaning of|definition of|about) {t}
{t} ; {t} ; what (does|do) {t} (mean|stand for) ; what (do you|does one|do people) (mean by|understand by|call) {t} ; what is meant by {t}
(can you|could you|would you|will you) (please |)(explain|describe|define|tell me about|talk about) {t} (to me|for me|in simple words|briefly|)
(give|offer) me a (definition|description|short explanation|summary) of {t} ; (in simple words|in short|basically|simply put), what is {t}
(i want to|i would like to|i'd like to|let me|i wish to|i need to) (know|learn|hear|understand) (about|more about|something about|what is|) {t}
(do you know|can you tell me|i wonder|could you say|tell me|explain|i do not know|please say|let me know) what {t} (is|are|means|mean)
(i have never heard of|i do not understand|never heard of|i am not sure what is|what about|how about|now|next|and) {t}
(what exactly|what really|so what|what in the world|what actually|and what|what then) (is|are) {t} (then|) ; what (sort|kind) of thing (is|are) {t}
explain {t} (to me like i am five|for beginners|to a child|in one sentence|quickly|in plain english|as simply as you can) ; help me understand {t}
(what should i know|what do i need to know|what can you say|what can you tell me|what do you know|say something|teach me something) about {t}
(i keep reading|people talk|everybody talks|i just read) about {t}, what is (that|it) ; {t}, what is (that|it|this) ; what is {t} (all about|about|again|in moe-local|here)
(the term|the word|the expression) {t} ; who or what is {t} ; (teach|show) me {t} ; {t} (explained|definition|meaning|please) ; is {t} a (thing|program|part of a model)
""",
    "why": """
why (do|would|should|must|does) (we|i|you|one|it|moe-local|a model) (need|use|want|have|care about) {t}
why (is|are) {t} (useful|important|needed|necessary|good|helpful|a good idea|interesting|relevant|there|so important|worth it|good to have)
why (does|do) {t} (matter|help|exist|make sense|work so well|pay off|make a difference) ; why {t} ; why is there {t} ; but why {t}
what (is|are) {t} (good|useful|used|needed|there) for ; what (is the|'s the) (point|use|purpose|benefit|advantage|reason|value|sense|importance|good) (of|for|behind|in) {t}
what (problem|problems) (does|do) {t} (solve|help with) ; what (does|do) {t} (bring|give|gain) (me|us|) ; (do|did) we (really |)need {t}
(is|are) {t} (important|useful|necessary|really needed|good for anything|worth it|any good|really useful) ; what do (i|we|you) (gain|get|win) (from|by|with) {t}
what are the (benefits|advantages|strengths|good sides|pros) of {t} ; (why would anyone|why would i|why should anybody) (want|use|care about|need) {t}
(tell me|explain|explain to me|can you say|i wonder|do you know|can you explain) why {t} (is useful|matters|helps|is important|is needed|are useful|matter|help)
(how does|how do|how can|in what way does) {t} (help|help me|help us|improve things) ; what would (happen|i lose|be worse) without {t} ; (does|do) {t} (help|matter)
(who|when does one) (needs|need) {t} ; what speaks for {t} ; the (purpose|point|benefit|reason) of {t} ; what makes {t} (useful|important|good|special|interesting)
""",
    "how": """
how (does|do|can|would) {t} (work|function|operate|actually work|really work|work exactly|work in moe-local|work in practice|work in detail|work internally)
how (is|are) {t} (done|implemented|made|built|computed|realized|organized|handled) ; (explain|tell me|show me|describe|i want to know|can you explain|could you tell me) how {t} (works|work|does its job|is done)
what (happens|goes on|is going on|happens exactly) (inside|in|during|behind) {t} ; what (does|do) {t} (do|do exactly|actually do|do inside)
(walk|take|lead|guide) me through {t} ; (what is|describe|explain) (the |)(mechanism|inner workings|steps|details|procedure|principle|logic) (of|behind) {t}
(the way|how) {t} (works|work) ; what are the steps (of|in) {t} ; how (exactly|precisely|technically) (does|do) {t} work ; in what way (does|do) {t} work
(i do not understand|i don't get|please show|teach me|i would like to understand) how {t} (works|work|is done) ; {t}, how does (it|that) work ; how {t}
(give|tell) me (the |more |some |)(details|technical details) (of|about|on) {t} ; explain {t} in (detail|depth|technical terms) ; the (mechanics|workings|details) of {t}
how (does|do|would) (moe-local|you|one|a model|it) (do|use|handle|implement|apply) {t} ; what is (inside|under the hood of) {t}
""",
    "example": """
(give|show|tell) me (an|one|some|a concrete|a simple|a real|a small|a numeric) (example|examples) (of|for|with|on) {t}
(can you|could you|would you|please) (give|show|make|provide) (me |)(an|a simple|a concrete|one) example (of|for|with) {t}
(an|one|a simple|a concrete|a practical|any|some) (example|examples) (of|for|on|with) {t} (please|) ; what (is|would be) (an|a good|a typical|a simple) example (of|for) {t}
(illustrate|exemplify|demonstrate) {t} ; show me {t} (in practice|with numbers|in action|in numbers|on an example) ; (do you have|is there|have you got|i need|i want|i would like) an example (of|for) {t}
{t} (example|for example|with numbers|in practice|in numbers) ; (make|explain) {t} (concrete|with an example|by an example|with numbers) ; (explain|describe) {t} using an example
what does {t} look like (in practice|in mixtral|with numbers|) ; (numbers|some numbers|typical numbers|a case) (for|of|about) {t} ; where (do i|can i) see {t} in practice
""",
}

# Follow-ups that keep the topic (or command) of the turn before.
FOLLOW = {
    "what": """
what is (it|that|this|that again|it exactly) ; what does (it|that|this) mean ; (what|sorry, what) (was|is) that again ; (define|explain) (it|that|this) (again|) ; and what is (it|that) ; what exactly is (it|that)
""",
    "why": """
why ; but why ; and why ; why (is that|is it|is this|so|that) ; why (does|do) (it|that|this|they) (matter|help|make sense) ; why (is|are) (it|that|this|they) (useful|important|good|needed|necessary|helpful|so important|interesting)
(and |so |ok, |)(why|what for) (do|would|should) (we|i|one|you) (need|use|want|care about|do) (it|that|this|them|such a thing) ; what (is|are) (it|that|this|they) (good|useful) for ; what (is|'s) the (point|use|benefit|purpose|advantage|reason) (of that|of it|of this|)
(is|are) (it|that|this|they) (important|useful|necessary|worth it|really needed|any good) ; why should i care ; (and|so) what (is|do i gain from|does) (that good for|that|it bring) ; what (does|do) (it|that) (bring|help|give me) ; what do i get from (it|that) ; how does (it|that) help ; why would (anyone|i) (want|do|use|need) (that|it|this) ; for what (reason|purpose|) ; tell me why ; why exactly
""",
    "how": """
how ; and how ; how (does|do|can) (it|that|this|they) (work|function|do that|happen|work exactly|work in detail|really work) ; how (is|are) (it|that|this) (done|made|computed|implemented|possible) ; how (exactly|precisely|so|come)
(explain|tell me|show me|and explain) how (it|that|this) works ; (ok |and |so |ok, and |well |)how does (it|that|this) (work|work then|actually work) ; what (happens|does it do|goes on) (exactly|in detail|inside|there) ; (can you|could you) explain (how|the mechanism|the details) (it works|) ; (more|some) details(, please|) ; in more detail ; what are the (steps|details) ; tell me (more|more about it|more about that|more details|the details) ; (more|more please|go deeper) ; can you (tell me more|go into detail|say more|elaborate|explain more)
""",
    "example": """
(give|show|tell) me (an|one|a concrete|a simple|some) (example|examples) (please|of that|of it|for that|for this|) ; (can you|could you|please) (give|show|make) (me |)(an|a concrete|one) example (of that|of it|for this|please|) ; for (example|instance) ; (an|any|another|one) (example|examples) (please|of that|) ; like what ; such as ; (do you have|is there|have you got|got|how about|and) an example (of that|for that|) ; example(, please|) ; (make|explain) it (concrete|with an example|with numbers) ; what would (that|it|an example) (look like|be) ; (illustrate|demonstrate) (that|it|this) ; with numbers(, please|) ; how does that look in practice ; i (need|want|would like) an example ; can i (see|have) an example
""",
}

# Questions about a command: by what the user wants to do, and by name.
WISH_FRAMES = """
(how do i|how can i|how could i|how would i|how does one|how should i|how to|how do you|how do we) {a} (with moe-local|here|)
(i want to|i would like to|i need to|i wish to|i have to|i am trying to|let me|help me|i'd like to|please|please help me to|i plan to|i try to) {a}
(which|what) (command|subcommand|tool|one) (do i use to|should i use to|lets me|can i use to|is there to|helps me to|do i need to|is for people who|must i type to) {a}
(can i|can you|may i|could i|is it possible to|is there a command to|is there a way to|does moe-local let me|what should i type to|what must i enter to|am i able to|does it help me) {a}
(show|tell|teach) me how to {a} ; what (do|must) i (do|type|enter) (to|if i want to) {a} ; (what is|what's) the (command|way|best way|easiest way) to {a} ; {a} ; (where|with what) can i {a} ; i do not know how to {a}
"""
COMMAND_FRAMES = {
    "what": """
(what is|what's|what does|explain|describe|tell me about|how do i use|how does|help with|show me|define|how can i use) {c} (do|work|mean|good for|used for|for|)
(what can i do with|what is|what happens when i (run|type|enter)|explain to me|i want to know about|can you explain|could you describe|do you know|what about|and|and what about) {c} ; {c} ; {c} (please|command|explained|help)
(what is|what's) (the purpose of|the use of|the point of|the meaning of|) {c} ; {c}, what (is|does) (that|it) (do|)
""",
    "why": """
why (would i|should i|do i need|is there|use|do i use|have|would anybody use|is it good to use) {c} ; when (do i|should i|would i|must i) (need|use|run) {c} ; (is|why is) {c} useful ; what is the (benefit|advantage) of {c} ; why does {c} exist
""",
    "example": """
(give|show|tell) me (an|one|some|a concrete) (example|examples) (of|for|with|on) {c} ; (an|one|a) example (of|for|with) {c} ; {c} example ; how does (a call|a line|an example) of {c} look (like|) ; (can you|could you|please) (give|show) (me |)an example (of|for|with) {c} ; example {c} ; do you have an example (of|for) {c}
""",
}

# Two topics at once: answered with one sentence for each of them.
PAIR_FRAMES = """
what is the difference between {t} and {u} ; {t} and {u} ; (compare|explain) {t} (and|with) {u} ; {t} (or|vs|versus) {u} ; what (is|are) {t} and {u} ; how (is|are|do) {t} (different|differ) from {u} ; tell me about {t} and {u} ; difference between {t} and {u}
"""

MODEL_NAMES = (
    "mixtral; mixtral 8x7b; mixtral-8x7b; mixtral; qwen3; qwen3-30b-a3b; qwen; gpt-oss; gpt-oss-120b; deepseek; "
    "deepseek-v3; a model; the model; this model; olmoe; an moe; a big model; glm; kimi; phi; the weights"
)
MEMORY_GB = "4; 6; 8; 10; 11; 12; 16; 20; 24; 32; 40; 48; 64; 80; 96"

# What the demo does not know.
UNKNOWN_ANSWER = (
    "I do not know that. I am a tiny demo that only knows about Mixture-of-Experts models and moe-local."
)
UNKNOWN_FRAMES = """
(who|when) (invented|discovered|built|wrote|made|started|found|painted|won|killed|composed|directed|founded|designed|sang|sings|owns|was|is|are|played|plays|stole) {n}
(who is|who was|who are) (the |)(king|queen|president|chancellor|leader|mayor|author|owner|inventor|best player|winner|boss|ceo|founder|father|mother|prime minister) of {n} ; who {n}
(how do i|how can i|how to|can you help me to|how does one|i want to|help me|teach me to|show me how to) (cook|make|repair|buy|sell|clean|draw|learn|play|find|grow|paint|visit|fix|bake|build|wash|catch|feed|write|plan|lose|save|win) {n}
what (is|was|'s) the (capital|price|color|age|weight|height|history|population|temperature|best place|name|length|size|origin|meaning|taste|speed|distance|cause|cure|formula|flag|currency|language|biggest part|longest part|tallest part|oldest part) of {n}
(where|when) (is|was|are|can i find|can i buy|did i see|do i get|does one find|can i see) {n} ; (where|when) (did|does|do|will) {n} (begin|start|end|live|happen|come from|die|open|close)
(do you|can you|will you|did you) (like|play|eat|understand|cook|love|recommend|see|make|draw|sing|buy|want|visit|watch|read) {n} ; what is your (favorite|favourite) {n} ; who is your (favorite|favourite) {n}
(write|tell|make|read|compose|give|sing) (me |)(a poem|a story|an essay|a song|a letter|a book|a haiku|a report|an email|a speech|a summary|a tale|lyrics|a text) (about|on|of|for) {n}
how (old|tall|far|long|fast|heavy|deep|expensive|big|dangerous|healthy|hot|cold|wide|strong|rich|far away) (is|are|was|were) {n} ; how (much|many) (does|do|is|are) {n} (cost|weigh|eat|there|sell for)
(recommend|suggest|find|show) (me |)(a good|a nice|some|the best|a cheap|a|an) {n} (near me|in town|in rome|in berlin|) ; what is the best {n} ; which {n} (is best|should i buy|should i choose|do you like) ; best {n}
(what is your opinion on|what happened to|what do you think of|is it true about|who lives in|tell me the price of|what do you think about|do you believe in|what happens in) {n}
how (does|do|did) {n} (work|function|start|end|happen|grow|die|live|move) ; what (is|are|was) {n} ; what's {n} ; explain {n} ; explain {n} to me ; describe {n} ; define {n} ; tell me (about|something about|a fact about) {n} ; {n} ; what about {n} ; why {n}
why (is|are|was) {n} (so |)(popular|big|old|expensive|blue|hot|cold|famous|dangerous|bad|good|red|important|round) ; why (do|does|did) {n} (exist|smell|fly|die|sleep|fall|happen) ; what does {n} mean ; give me an example of {n} ; example of {n} ; how many {n} are there
how many (legs|eyes|people|days|states|countries|players|wheels|teeth|children|pages|bones|planets) (does|do|are in|has|have) {n} (have|) ; what (color|colour|shape|size|animal|language) (is|are) {n} ; is {n} (healthy|dangerous|expensive|an animal|a country|a fruit|good for me|true|real|alive|a city)
(translate|say) {n} (into|to|in) (french|german|spanish|english|italian|latin|japanese|chinese) ; can you translate {n} (into french|into german|into spanish|for me) ; how do you say {n} in (french|german|spanish) ; (spell|pronounce) {n}
(book|order|buy|find|get|send|bring|call) (me |)(a |an |the |some |)(flight|hotel|table|taxi|ticket|pizza|train|doctor|room|present) (to|for|in|near|at) {n} ; (book|order|buy|reserve|send) (me |)(a |an |the |some |){n} ; (open|close|start|play|turn on|turn off|set|delete) {n}
(is|are|was) {n} (better|older|bigger|cheaper|faster) than {m} ; (compare|what is the difference between) {n} (and|with) {m} ; {n} or {m} ; {n} and {m} ; what do {n} and {m} have in common
should i (buy|eat|sell|marry|visit|learn|try|watch|read|cook|wear|study) {n} ; can i (eat|drink|buy|keep|ride|marry|touch|own) {n} ; what (can|should|do|could) i (eat|cook|wear|read|watch|do|drink|buy|bring|play|study) (for|with|in|at|tonight|today|about) {n}
(what|which) (should|shall|can|could|do) (i|we) (eat|cook|wear|read|watch|drink|buy|do|play|study) (today|tonight|tomorrow|now|this evening|for dinner|for lunch|on sunday|this weekend|next)
"""
UNKNOWN_WHOLE = """
what time is it ; what day is (it|today) ; how is the weather (today|tomorrow|) ; (will it|does it|is it going to) (rain|snow|be sunny|be cold|be warm) (today|tomorrow|) ; what is {x} (plus|times|minus|divided by|+|*) {y} ; {x} (+|-|*|/|plus|times|minus) {y} ; {x}(+|-|*|/){y} ; what is {x}(+|*|-){y} ; {x}(+|*|-){y}=? ; (calculate|compute|solve|work out) {x} (plus|times|minus|*|+|divided by) {y}
how much is {x} (plus|times|minus|and|divided by) {y} ; what is (the square root|the square|half|a third|twice|ten percent|the double) of {x} ; is {x} (a prime number|even|odd|a prime) ; how many (days|hours|minutes|seconds|meters|grams|feet|cents|weeks) (are in|are there in|has|in) {x} (weeks|days|miles|kilos|dollars|hours|years|months) ; convert {x} (miles|feet|pounds|dollars|euros) to (km|meters|kilos|euros|dollars)
who is the president (of france|of the country|) ; (tell me|read me|invent) a (story|tale|fairy tale) ; sing (me |)a song ; tell me the news ; what (happened|is new) (today|in the world|yesterday|) ; what is the meaning of life ; (write|do) (my homework|an essay for me|a letter for me|my taxes) ; play some music ; what is my horoscope ; solve this (equation|puzzle|riddle|problem) ; draw (me |)a picture ; who will win the (election|match|game|cup) ; what year is it ; what is the date ; (count|add) (to|up to) {x}
what is (my name|my age|my birthday|my password|my address) ; where am i ; where do i live ; who am i ; (what|which) number am i thinking of ; guess my (age|name) ; do you know me ; will you marry me ; (can|do) you have (money|a girlfriend|a pet|a car|brothers|a job) ; is there (life after death|a god|life on mars|a heaven) ; which came first, the chicken or the egg ; to be or not to be
write (a|some|me a) (python|java|c|javascript|rust|) (program|function|script|code|class|website|game) (that sorts a list|for me|that prints hello|to add numbers|) ; fix my code ; (what is|which is|what's) the best (programming language|editor|operating system|phone|laptop|movie|book|song|football team|restaurant|car|country|food|job|sport|university) (in the world|ever|) ; how do i center a div ; what does this error mean
(set|make) (an alarm|a timer|a reminder) for {x} (minutes|o'clock) ; remind me to (call my mother|buy milk|sleep) ; call (my mother|the police|a taxi) ; send (an email|a message) to (my boss|my friend) ; search (the web|google|the internet) for (cats|news|flights) ; (turn|switch) (on|off) the (light|lights|radio|tv) ; open (the door|youtube|the window|my mail)
i have a (dog|cat|horse|question about my car|pain in my leg|new job|new house|date tonight) ; my (dog|cat|car|bike|phone|leg|tooth|boss|brother) (is ill|is broken|hurts|is angry|barks|is old|does not start) ; what should i name my (dog|cat|baby|boat) ; how do i (lose weight|get rich|fall asleep|find friends|stop smoking|quit my job|get a visa|tie a tie|change a tire|open a bottle|boil an egg)
"""
UNKNOWN_THINGS = (
    "france; paris; london; berlin; rome; madrid; tokyo; china; india; brazil; canada; egypt; russia; poland; sweden; the sea; "
    "the moon; the sun; mars; jupiter; saturn; the earth; the stars; the universe; a comet; cats; dogs; an elephant; a tiger; "
    "a lion; a horse; a cow; a pig; a bird; an eagle; a snake; a frog; a shark; a whale; a bee; an ant; a butterfly; a mouse; "
    "pancakes; pizza; pasta; bread; chocolate; coffee; tea; a cake; cheese; an apple; a banana; rice; soup; an egg; wine; beer; "
    "milk; water; sugar; salt; potatoes; tomatoes; a sandwich; a burger; sushi; football; tennis; chess; basketball; golf; "
    "swimming; skiing; boxing; the olympic games; the champions league; the world cup; the super bowl; the president; the king; the "
    "pope; the prime minister; napoleon; caesar; einstein; newton; shakespeare; mozart; beethoven; picasso; elvis; the beatles; "
    "michael jackson; batman; harry potter; star wars; the lord of the rings; titanic; faust; macbeth; the bible; love; happiness; "
    "god; money; bitcoin; gold; oil; the stock market; inflation; taxes; a mortgage; insurance; history; biology; chemistry; physics; "
    "mathematics; geography; philosophy; art; music; poetry; photosynthesis; gravity; evolution; dna; a virus; a vaccine; cancer; "
    "a cold; a headache; the heart; the brain; blood; a bone; a tooth; a black hole; an atom; a molecule; electricity; a magnet; "
    "light; sound; dinosaurs; the ocean; a volcano; an earthquake; the weather; rain; snow; wind; a rainbow; winter; summer; autumn; "
    "spring; my car; a bicycle; an airplane; the train; a bus; a ship; a rocket; an engine; a steam engine; a pump; a fridge; an oven; a "
    "washing machine; a vacuum cleaner; a lamp; a clock; a watch; a camera; a radio; a television; a phone; a guitar; a piano; a "
    "violin; a trumpet; a drum; a saxophone; an oboe; a novel; a poem; a movie; a song; a painting; a photo; a restaurant; a hotel; a "
    "museum; a church; a castle; a bridge; a tower; the eiffel tower; the great wall; the pyramids; the colosseum; a river; the nile; the "
    "amazon; the alps; mount everest; a mountain; a forest; a tree; a flower; a rose; grass; a garden; a farm; a house; a kitchen; a door; "
    "a window; a chair; a table; a bed; a shirt; shoes; a hat; a dress; a knife; a hammer; a school; a teacher; a lawyer; a judge; an "
    "election; democracy; a war; the second world war; the cold war; the french revolution; the middle ages; the greeks; the "
    "vikings; the aztecs; rome's emperors; a pirate; a knight; a ghost; a dragon; a unicorn; santa claus; christmas; easter; a birthday; a "
    "wedding; a party; a dream; sleep; fear; anger; luck; death; life; my wife; my boss; my neighbor; my mother; a baby; a child; a "
    "friend; a student; java; excel; windows; a website; a browser; a printer; a keyboard; linux; a blockchain; a database; a "
    "compiler; html; git; docker; a firewall; an email; instagram; youtube; google; facebook; tesla; amazon; apple's phone; netflix; a "
    "drone; a robot dog; a satellite; solar panels; nuclear power; a battery; a diet; yoga; a marathon; vitamins; a haircut; perfume; a "
    "visa; a passport; a train ticket; a job interview; a cv; a pension; a bank; a loan; a credit card; good morning; good night; cheese cake"
)
SYLLABLES = (
    "ba be bi bo bu da de di do du fa fe fi fo ga go ka ke ki ko la le li lo lu ma me mi mo mu na ne ni no pa pe pi po ra re ri ro ru "
    "sa se si so ta te ti to va ve vi vo wa wo za zo zu bran crel drim flon glip plim quor stam trev skol xq zt fn orp"
)

# What people put around a question.
PREFIXES = (
    "please ; hey, ; so ; ok, ; hi, ; well, ; now ; um, ; and ; also, ; one question: ; i was wondering, ; quick question: ; hello! ; "
    "sorry, ; just curious, ; can you tell me, ; i'd like to know: ; say, ; good. ; thanks. ; ok then, ; tell me, ; hmm, ; alright, ; "
    "next question: ; another thing: ; but ; ah, ; great, ; and now ; interesting. ; ok so ; i see. ; hello, ; so tell me, ; cool. ; right,"
)
SUFFIXES = (
    "please ; exactly ; again ; in moe-local ; then ; thanks ; in short ; by the way ; here ; for me ; in a few words ; actually ; really ; "
    "now ; in simple terms ; in general ; my friend ; if i may ask ; at all ; anyway ; too ; for a beginner ; when running a model ; today"
)
FILLERS = "really; actually; just; maybe; kind of; basically; like; even; still; the; so; exactly; please; simply; then; also; now; all"
SMALL_WORDS = "is the a an do does can i to of me it what how are you be for in on and that this my"
SYSTEM_PROMPTS = (
    "You are a helpful assistant.; You are the moe-local demo.; Answer briefly.; Be concise.; You are a friendly assistant.; "
    "Answer in short sentences.; You answer questions about Mixture-of-Experts models.; You are a helpful, honest assistant.; "
    "Answer in one sentence.; Be polite."
)
