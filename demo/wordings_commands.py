"""The commands of moe-local as the demo explains them, read by `intents.py`.

`@ key : names` opens a command, `does:` lists what a user wants to do with it ({m} is a model's name), then
answers and hand-written questions as in `wordings_topics.py`.
"""

COMMANDS = """
@ chat : chat | moe-local chat | the chat command
does: start a chat | talk to a model | talk to {m} | have a conversation | chat with {m} | open a chat | chat in the terminal
does: speak with {m} | begin a conversation with {m} | start {m} | use {m} interactively | try {m} | ask {m} questions
what: moe-local chat opens a conversation in the terminal. Try moe-local chat mixtral-8x7b, or no name for this small demo.
why: moe-local chat is useful when you want to ask several questions and keep the conversation in memory.
example: For example, moe-local chat mixtral-8x7b --vram 20GiB chats with Mixtral and uses at most 20 GiB of VRAM.
what? (which command|what|how do i) (starts|opens|start|open) (a|the) (chat|conversation|dialog|interactive session) ; i want to (talk|chat|speak) (to|with) a (big|large|real|better) model
what? (can|could) i (chat|talk) (with|to) (a bigger model|another model|a real model|{m}) ; (start|open|launch) (a chat|a conversation|{m}) ; let me talk to {m}

@ run : run | moe-local run | the run command
does: answer one prompt | run a single prompt | ask {m} one question | get one answer and exit | use a prompt in a script
does: send one prompt to {m} | ask a question from the shell | run {m} once | generate text from a script | pipe an answer into a file
what: moe-local run answers one prompt and exits. Try moe-local run mixtral-8x7b followed by your question in quotes.
why: moe-local run is useful in scripts, because it prints one answer and ends.
example: For example, moe-local run mixtral-8x7b "Why is the sky blue?" prints one answer.
what? (is there|which is|what is) (a|the) (non-interactive|one-shot|scriptable) (command|mode|way) ; (one|a single|just one) (question|prompt|answer) (from|in) (the command line|a script|bash)
what? (how do i|can i) (use|call) (it|moe-local|{m}) (in|from) (a bash script|a shell script|a script|cron) ; (only|just) one answer(, no chat|without a chat|)

@ serve : serve | moe-local serve | the serve command | the server
does: start a server | use {m} from an openai client | get an http api | serve {m} | connect my app | run an api server | host {m}
does: offer {m} to other programs | use it with an openai client | make {m} available over http | let other programs use {m}
what: moe-local serve starts an HTTP server that speaks the OpenAI protocol. Try moe-local serve mixtral-8x7b and point your client to it.
why: moe-local serve is useful when other programs should use the model, because any OpenAI client can talk to it.
example: For example, moe-local serve mixtral-8x7b --port 8000 answers OpenAI clients at 127.0.0.1:8000.
what? (is there|do you have|does it have|i need|i want) (an|a|the) (api|http api|server|web server|openai api|rest api|endpoint|openai endpoint)
what? (which|what) (port|address|host) (does|is) (the server|serve|it) (use|listen on|on) ; (how do i|can i) (connect|use|plug in) (my|an|a) (app|chat app|openai client|web app|editor|program)
what? (is it|does it) (openai|open ai) compatible ; (expose|offer|provide) (an api|{m} as an api|a model over http) ; (run|start|launch) (the|a) server

@ fit : fit | moe-local fit | the fit command
does: know if {m} fits | check whether {m} fits my gpu | see how much memory {m} needs | find out if {m} fits in memory
does: plan the memory | estimate the vram for {m} | see if my card is big enough | know whether {m} runs on my card
does: check the memory before a download | find out what fits on my machine
what: moe-local fit shows what fits where before you download anything. Try moe-local fit mixtral-8x7b --vram 24GiB --ram 64GiB.
why: moe-local fit is useful because it tells you about memory and speed without downloading the weights.
example: For example, moe-local fit qwen3-30b-a3b --vram 12GiB shows how many experts stay on a 12 GiB card.
what? (will|does|can|would) {m} (fit|run|work) (on|in|with) (my card|my gpu|{g} gb|{g} gb of vram|a {g} gb card|my {g} gb gpu|my laptop|my computer|my machine|{g} gigabytes|an rtx 4090|an rtx 3060)
what? (can i|could i|am i able to) run {m} (on|with) (my card|{g} gb|{g} gb of vram|my gpu|a {g} gb card|my laptop|{g} gb vram|an rtx 3090) ; is {g} gb (enough|sufficient|too little) (for {m}|)
what? (i have|my card has|my gpu has|i own) {g} gb(| of vram| of memory)(, can i run {m}|, is that enough|, will {m} work|, what can i run|, does {m} fit)
what? (how do i|can i) (check|see|know|find out|tell) (if|whether) (it|a model|{m}|my model|something) (fits|will fit|fits my card|fits into memory|runs here) ; {m} on a {g} gb (card|gpu)
what? (do i have|have i got) enough (memory|vram|ram) (for {m}|) ; (is|would) my (gpu|card) (be |)(big enough|large enough|ok|too small) (for {m}|)

@ bench : bench | moe-local bench | the bench command | the benchmark
does: measure the speed | benchmark {m} | see how fast {m} is | test the performance | find out where the time goes | measure the stalls
does: measure tokens per second | know how fast {m} runs here | test the speed of {m} | count hits and misses | compare settings
what: moe-local bench measures tokens per second, hits and stalls, and shows where the time goes. Try moe-local bench mixtral-8x7b.
why: moe-local bench is useful because it shows whether the time goes into copies, the CPU or the GPU.
example: For example, moe-local bench mixtral-8x7b --slots 4 measures the speed with four experts per layer in fast memory.
what? (is there|do you have) (a|any) (benchmark|speed test|performance test) ; (where|on what) does (the|all the|my) time (go|get spent) ; (measure|test|benchmark) (the speed|{m}|performance|my machine)
what? how (do|can) i (see|get|measure|count) (the hit rate|the stalls|tokens per second|cache statistics|the misses|statistics)

@ convert : convert | moe-local convert | the convert command | conversion
does: quantize a model | convert the experts | prepare {m} | make a 4-bit version | convert a checkpoint | quantize {m}
does: convert {m} to nf4 | turn {m} into nf4 | compress a model | write an expert file | shrink {m}
what: moe-local convert quantizes a model's experts and writes them to disk once. Chat does it by itself on first use.
why: moe-local convert is useful when you want the slow first step done before you need the model.
example: For example, moe-local convert mixtral-8x7b --experts nf4 writes the experts of Mixtral in four bits.
what? (do|must|should) i (have to |need to |)(convert|quantize|prepare) (a model|{m}|the model|anything|it) (first|before|myself|) ; (make|create|get) (a|the) (4-bit|quantized|nf4|smaller) (version|copy|model)

@ pull : pull | moe-local pull | the pull command | the download command
does: download a model | get the weights | fetch {m} | download {m} | download the weights of {m} | get {m} from the hub | pull {m}
does: fetch a model from hugging face | load {m} onto my machine | get a new model | save {m} on my disk | have {m} on this computer
what: moe-local pull downloads a model from the Hub without starting it. Try moe-local pull mixtral-8x7b.
why: moe-local pull is useful when you want the download done before you start to work, or on a slow line.
example: For example, moe-local pull qwen3-30b-a3b downloads Qwen3-30B-A3B from the Hub.
what? where (can|do) i (get|download|find) (a model|{m}|models|the weights|the weights of {m}|new models) ; (get|download|fetch|pull) (me |)(a model|{m}|the weights|the {m} weights) (please|now|from the hub|)
what? (how|where) (can|do) i (download|get|fetch) (it|that|that model|this model|that one) ; (can|does) (it|moe-local) download (models|{m}|the model) (for me|by itself|)

@ list : list | moe-local list | the list command
does: see my models | list the models i have | show which models are installed | see what models are on this computer
does: know which models i downloaded | get a list of my models | see all downloaded models | find my models
what: moe-local list shows the models on this machine and their sizes.
why: moe-local list is useful to see which models take space and which names you can chat with.
example: For example, moe-local list --json prints the same list as one JSON document.
what? (which|what) models (are|do i have) (installed|here|on this machine|downloaded|on my computer|already there|on my disk|locally) ; (my|all|the) (installed|downloaded|local) models
what? (did i|have i) (already |)(download|downloaded|pull|installed) {m} ; how much space do my models (take|use)

@ show : show | moe-local show | the show command
does: see the details of a model | inspect {m} | see how many layers {m} has | get information on one model | see the top-k of a model
does: read the details of {m} | see which format a model has | look at the structure of {m} | know the number of experts of a model
what: moe-local show prints the details of one model: layers, experts, top-k, formats and sizes.
why: moe-local show is useful when you want to know how a model is built before you run it.
example: For example, moe-local show mixtral-8x7b tells you that it has 32 layers with eight experts each.
what? (where|how) (can|do) i (find|see|get|read) (details|information|the details|more details|the layers|the number of layers|the top-k|the config) (of|about|on|for) (a model|{m}|one model)
what? (details|information|facts) (of|about|on) (a|my) (model|installed model)

@ rm : rm | moe-local rm | the rm command | remove
does: delete a model | remove {m} | free the disk space | uninstall a model | delete {m} | remove {m} from my disk | erase {m}
does: get rid of {m} | clean up old models | throw {m} away | delete models i do not need | make room on my disk
what: moe-local rm deletes a model from this machine and frees its disk space. Try moe-local rm followed by the model's name.
why: moe-local rm is useful because big models fill a disk quickly.
example: For example, moe-local rm mixtral-8x7b deletes Mixtral from this machine.
what? (my disk is|the disk is|my ssd is) (full|almost full|too small) ; (i do not need|i no longer need|i don't want) {m} (any more|anymore|)(, how do i delete it|) ; (delete|remove|erase|uninstall) (a model|{m}|all models|my models)
what? how (can|do) i (delete|remove) (it|that model|this model|a model) (again|) ; {m} takes too much (disk |)space

@ doctor : doctor | moe-local doctor | the doctor command
does: check my system | find out what is wrong | check my machine | measure the bandwidth | diagnose problems | test my setup
does: check whether my gpu is found | find a problem with my installation | see if everything works | check my driver | debug my setup
what: moe-local doctor checks your machine: GPU, memory, disk and bandwidth. Run it first when something does not work.
why: moe-local doctor is useful because most problems come from the driver, the memory or a slow link, and it tests them.
example: For example, moe-local doctor tells you how many GB per second your PCIe link really moves.
what? (something|it|moe-local|my setup|the program) (is broken|does not work|doesn't work|does not start|fails|crashes|is not working) ; (my|the) gpu is not (found|detected|used|seen) ; i (have|get|see) (a problem|an error|problems|errors)
what? (how do i|can you|can i) (check|test|diagnose|verify) (my|the) (system|setup|gpu|machine|installation|driver|hardware) ; (what is|is something) wrong (with my system|with my gpu|here|) ; (troubleshoot|help me debug)
"""
