"""What the demo can explain: one block a topic, read by `intents.py`.

`@ key : names` opens a topic, `aspect: text` is its answer, `aspect? a ; b` are questions written by hand for
that answer, beside those that `wordings_frames.py` makes from the names.  `(a|b|)` is a choice.
"""

TOPICS = """
@ moe : a mixture of experts | mixture of experts | an moe | an moe model | moe models | moe | sparse experts
what: A Mixture-of-Experts model, or MoE, has many small expert networks in each layer and uses only a few of them for each token.
why: MoE models know a lot for little work: all experts hold knowledge, but only a few of them compute for each token.
how: In each MoE layer a router scores the experts, the best few run on the token, and their outputs are added by weight.
example: For example, Mixtral 8x7B has eight experts in each layer and runs two of them for every token.
what? what (is|does) mixture of experts (mean|stand for|about) ; what kind of model is (an moe|mixtral) ; what (does|do) the letters moe (mean|stand for)
what? (explain|describe) the (idea|concept|principle) (of|behind) (moe|mixture of experts|sparse experts) ; i (heard|read) about moe, what is (it|that)
why? why (is|are) (moe|moe models|mixture of experts) (so |)(popular|good|better|efficient|cheap|fast) ; why (use|take|train|build) (many|several|so many) experts (instead of one|)
why? what (is|are) the (advantage|advantages|strength|benefit) of (having many experts|an moe|sparse models|using only a few experts) ; why do (companies|people|labs) (train|build|release) moe models
why? why not (use|run) all experts for (every|each) token ; why does an moe need (less|little) (compute|work)
how? what happens (in|inside) (an moe layer|a moe layer|an moe) ; what happens (when|if) a token (enters|reaches|arrives at) (an moe layer|the moe layer|a layer)
how? how (is|are) the (outputs|results) of the experts (combined|added|mixed|put together) ; walk me through (an moe layer|one moe layer)
example? how many experts (are there|does a layer have|are in a layer|does an moe have|do models have|exist|does one layer have|are there in a layer)

@ expert : an expert | experts | one expert | the experts | a single expert | expert networks
what: An expert is a small feed-forward network inside an MoE layer. Each layer has several, and each token visits only a few.
why: Experts let a model grow without more work per token: more experts hold more knowledge, but only a few of them run.
how: An expert multiplies the token's vector by two matrices, applies SiLU as a gate, and multiplies the result by a third matrix.
example: For example, one expert of Mixtral has 176 million weights, which are about 91 MB in NF4.
what? what is (meant by|) (the word |the term |)expert (here|in this context|in moe|in a layer) ; what (are|is) (these|those|the) experts (you talk about|everyone talks about|)
what? is an expert (a|some) (network|layer|program|person|matrix) ; what does (the word|the term) expert mean
why? why (does|do) (a|the) (model|layer|layers) (have|need|contain) (experts|several experts|many experts) ; why are there (so many|several|eight|many) experts
how? what does an expert (compute|calculate|do|consist of|do with a token) ; what is (in|inside) an expert ; which (matrices|weights) does an expert (have|contain)
how? what (happens|goes on) (in|inside) (an|one|a single) expert ; how is an expert (built|made|structured|computed)
example? how (big|large|heavy) is (an|one|a single) expert (of mixtral|in mixtral|) ; how many (bytes|mb|weights|parameters) (has|does) (an|one) expert (have|) ; (size|weight) of an expert
example? what (do experts|does an expert) look like ; how many (numbers|matrices) are in an expert

@ router : a router | the router | routers | the gate | the gating network | routing | expert routing
what: The router is a small linear layer that scores all experts for a token and sends the token to those with the best scores.
why: The router matters because it decides which experts a token needs, and so which experts must be in fast memory.
how: The router multiplies the hidden state by its weights, takes a softmax over the experts, and keeps the top few.
example: For example, a router may give expert 3 a weight of 0.7 and expert 5 a weight of 0.3, and only those two run.
what? (who|what|which part) (chooses|selects|picks|decides on) (the|an) (expert|experts) ; what (sends|directs|routes) (a token|tokens) to (the|its|their) experts
what? which part of (the model|an moe) (chooses|decides|selects) ; how does (a|the) token (find|get to) its expert
why? why does (an moe|the model|a layer) need a router ; what (would happen|happens) without (a|the) router ; what is the router (good|useful) for ; why is the router's (choice|decision) important
how? how (does|will|can) the router (choose|select|pick|decide|know|find|score) (the experts|an expert|experts|which experts to use|which expert is best|)
how? how are (tokens|the tokens) (assigned|sent|routed|directed) to experts ; how are (expert|the experts'|router) (scores|weights) (computed|calculated|made)
how? how is an expert (selected|chosen|picked) ; how does the model (choose|pick|select) (its |the |)experts ; how does the model know which expert to (use|take)

@ topk : top-k | top k | top-k routing | top-2 | top 2 routing | the number of active experts
what: Top-k is the number of experts that run for each token in a layer. Mixtral uses top-2, so two experts run.
why: Top-k keeps the work small: a larger k would use more experts and more time, a smaller k is faster but weaker.
how: Top-k takes the k highest scores of the router and scales their weights so that they add up to one.
example: For example, Mixtral takes two of eight experts, and Qwen3-30B-A3B takes eight of 128.
what? what is (the|this) k (in top-k|) ; what does the k (mean|stand for) ; how many experts (run|are active|are used|work) (for each token|per token|at once|at the same time)
what? what is an active expert ; how many experts does (a|each|one) token (use|visit|need)
why? why (are only a few|are only some|do only two|do only a few) experts (used|run|active) ; why (not|do we not) (run|use) more experts (per token|) ; what if k (is|were) (larger|bigger|smaller)

@ balance : load balancing | the load balancing loss | the auxiliary loss | aux loss | expert balance | balanced routing
what: Load balancing keeps all experts busy: a small extra loss in training punishes a router that always picks the same experts.
why: Load balancing matters because otherwise a few experts would do all the work and the others would never learn.
how: The load balancing loss multiplies each expert's share of the tokens by its mean probability. Equal shares make it smallest.
example: For example, with eight experts and top-2 a balanced router sends about a quarter of the tokens to each expert.
what? how (do you|does training|does one|can one|do they) (keep|make) (the experts|all experts) (busy|equal|balanced|used) ; are all experts (used|busy) equally
what? how do you (stop|prevent|keep) (the|a) router from (always choosing|choosing|picking) (the same|one) expert
why? why (must|should) (the|all) experts be (balanced|used equally|busy) ; is it bad if (some experts are never used|one expert does everything|an expert is never used)

@ cache : the expert cache | an expert cache | a cache | the cache | caching | expert caching | an lru cache | the lru cache | lru
what: The expert cache keeps recently used experts in VRAM, because the next tokens often need the same ones again.
why: The expert cache matters because an expert that is already in VRAM costs no copy, and copies are what takes time.
how: The cache works like this: each use marks an expert as newest, and when a new one needs room, the least recently used one is dropped.
example: For example, with three slots and the uses A, B, C, A, D, the cache drops B, because B was not used for the longest time.
what? what (is|does) (lru|least recently used) (mean|stand for|) ; what (is|gets) (kept|stored|held) in the (cache|expert cache) ; what (does|do) you (keep|put) in the cache
what? where does moe-local keep (the|its) (hot|recent|useful|used) experts ; what kind of cache (is it|is used|does moe-local use|do you have)
why? why (do|does) (you|we|moe-local|it) (keep|cache|hold|store) (the |some |recent |)experts (in vram|in memory|) ; what (does|would) (a|the) cache (bring|help|improve|save)
why? why (is|does) (a|the) cache (help|useful|needed|good|work so well) ; does (a|the|caching) cache (help|make it faster|speed things up) ; do (tokens|experts) repeat
how? how (do|does) (the|your|an|this) (expert |lru |)(cache|caching) (work|function|operate|decide) ; how does moe-local (cache|remember|keep) experts ; how (are|is) (the |)experts cached
how? explain (how|) the (lru |expert |)cache (works|in detail|to me) ; what is the (rule|policy|logic|algorithm) of the cache ; which (rule|policy) does the cache (use|follow)

@ eviction : eviction | evicting an expert | cache eviction | expert eviction | dropping experts
what: Eviction means that an expert leaves VRAM to make room for another one. Usually it is the least recently used expert.
why: Eviction is needed because VRAM holds only a part of the experts, so a new one must take the place of an old one.
how: An evicted expert is simply dropped, never written back, because its bytes are still in RAM or on disk.
example: For example, with four slots a fifth expert evicts the one of the four that was not used for the longest time.
what? (when|which time) (is|are) (an expert|experts) (evicted|dropped|removed|thrown out) ; which expert (is|gets) (evicted|dropped|removed|replaced|thrown out)
what? what does (evict|evicted|eviction) mean ; which expert (leaves|has to go) (first|)
why? why (must|do|does) (an expert|experts) (leave|get evicted|have to go) ; why (are|is) (an expert|experts) (evicted|dropped|removed|thrown out)
how? what happens (to|with) (an|the) (evicted|dropped|removed|old) expert ; is (an|the) evicted expert (lost|saved|copied back|written back|deleted) ; where does (an|the) evicted expert go

@ hit : a cache hit | cache hits | a hit | hits | the hit rate | a high hit rate
what: A cache hit means that the expert a token needs is already in fast memory, so nothing has to be copied.
why: Hits matter because a hit costs almost no time, while a miss has to wait for the link or for the CPU.
how: The hit rate is the number of hits divided by all uses of experts. More slots and good prefetch raise it.
example: For example, if 80 of 100 uses find their expert in VRAM, the hit rate is 80 percent.
what? what happens (when|if|in case) (the|an) expert is (already |)(in vram|in the cache|there|resident|in fast memory) ; what (counts as|is called) a hit
why? why (do|does) (you|we|one) want (a high hit rate|many hits|more hits) ; is a (high|low) hit rate (better|good|bad)
how? how (do|can|could) (i|we|you) (raise|improve|increase|get) (the hit rate|a higher hit rate|more hits) ; how is the hit rate (computed|measured|defined|calculated)

@ miss : a cache miss | cache misses | a miss | misses | a stall | stalls | stall time
what: A cache miss means that a token needs an expert that is not in VRAM. It is then copied over PCIe or computed on the CPU.
why: Misses matter because the GPU stalls while it waits for a missing expert, and these stalls are most of the lost time.
how: For each miss moe-local compares the cost of copying the expert with the cost of computing it on the CPU and takes the cheaper way.
example: For example, a miss of one Mixtral expert in NF4 takes about 4 ms over PCIe 4 with 16 lanes.
what? what (counts as|is called) a miss ; what does (it mean|miss mean) (when an expert is missing|if the cache misses|)
why? why (is|are) (a miss|misses|stalls|waiting) (so |)(bad|slow|expensive|costly) ; why (does|must) the gpu (wait|stall) ; what is (bad|wrong) about (misses|a miss)
how? (does|will) (a miss|moe-local) (copy|fetch|use the cpu|compute on the cpu) ; how (is|are) (a miss|misses) (handled|treated|served|resolved) ; what does moe-local do (on|with|about|in case of) a miss
example? how (long|much time|many ms) does (a|one) miss (take|cost|last)

@ prefetch : prefetch | prefetching | expert prefetch | the prefetcher | speculative loading | loading experts early
what: Prefetch loads experts before they are needed. moe-local asks the router of a later layer early and copies what it predicts.
why: Prefetch helps because a copy that runs while the GPU is computing costs no waiting time.
how: Prefetch gives the current hidden state to the next layer's router, takes the experts it would choose, and copies the missing ones.
example: For example, while layer 5 computes, prefetch already copies the two experts that layer 6 will probably need.
what? what does (prefetch|the prefetcher|prefetching) (do|mean) ; what (does|do) (it|you) load (early|ahead|in advance) ; is there (any |a |)prefetch(ing|) in moe-local
why? why (does|do|would|can|will|should) (prefetch|prefetching|loading early|the prefetcher) (help|work|pay off|make it faster|speed things up|save time|be useful|be faster)
why? (does|will|can) (prefetch|prefetching) (help|really help|improve the speed|bring anything|make a difference|help the cache) ; why (load|fetch|copy) experts (early|ahead of time|in advance|before they are needed)
why? why (is|does) prefetch (good|help|helpful) for the (cache|speed|gpu|hit rate) ; (how|why) does prefetch (hide|reduce|avoid) (latency|stalls|the copies|waiting|misses)
how? how (can|does|do) (you|it|moe-local|prefetch|the prefetcher) (know|predict|guess|find out|foresee) (which|what) experts (will be needed|come next|it needs|are next|to load|the next layer needs)
how? how (are|is) (the |)(next |future |)(experts|expert) predicted ; how (does|can) (it|one|moe-local) (predict|guess|look into) (experts|the future|the next experts) ; where does the (prediction|guess) come from
how? (what|which experts) (does|do|will) (moe-local|it|you|the prefetcher) (prefetch|load early|load ahead) ; how (does|do) (it|moe-local|you) decide (what|which experts) to (prefetch|load early|load first)

@ quant : quantization | quantisation | quantizing | quantized experts | expert quantization | low precision
what: Quantization stores weights in fewer bits, for example 4 instead of 16, so that more of them fit in memory.
why: Quantization matters because a smaller expert is copied faster, and more small experts fit in the cache.
how: Quantization splits the weights into small blocks, keeps one scale for each block, and rounds each weight to a few levels.
example: For example, the experts of Mixtral need 90 GB in 16 bits, but only about 23 GB in NF4.
what? what (does|is) (quantized|quantize|a quantized model|quantised) mean ; what happens (to|with) (the |a |)(weights|model|numbers) (when|if) (i|you|they|it is) quantize(d|)
why? why (do|does|should|would) (you|we|i|moe-local|one) (quantize|compress|shrink|use fewer bits for) (the |)(experts|weights|model|a model) ; why (use|take) (fewer|only four|4|so few) bits
why? what is the (gain|advantage|benefit) of (fewer bits|4 bits|small weights|quantized weights)
how? how (do|does|can) (you|it|moe-local|one) (quantize|compress|shrink) (a weight|weights|the experts|an expert|the model) ; how are (the |)(weights|experts) (rounded|compressed|made smaller|quantized)

@ nf4 : nf4 | the nf4 format | normal float 4 | 4-bit normal float | the 4-bit format | four bit weights
what: NF4 is a number format of four bits whose 16 levels are placed for normally distributed weights. moe-local uses it for experts.
why: NF4 is useful because it makes experts almost four times smaller than 16 bits and costs very little quality.
how: NF4 divides each block of 64 weights by its largest value and stores for each weight the nearest of 16 levels.
example: For example, with its scales NF4 takes about 4.13 bits a weight, so a Mixtral expert shrinks from 352 to 91 MB.
what? what (format|number format|bits) (do|does) (the experts|moe-local|you|it) use ; in (which|what) format are (the |)(experts|weights) (stored|saved) ; what does nf4 (mean|stand for)
why? why (is|use|choose|take) nf4 (better|good|and not int8|instead of int8|for experts|by default|)
how? how does nf4 (store|save|round|encode) (a weight|weights|numbers) ; how many (levels|values) (does|has) nf4 (have|)
example? how many bits (does|is|has) (nf4|a weight|each weight|an nf4 weight) (take|need|have|use|cost|) ; how (small|big) is (nf4|an expert in nf4)

@ vram : vram | video memory | gpu memory | graphics memory | the memory of the gpu | card memory
what: VRAM is the memory on the graphics card. It is very fast but small, so only a part of a big model's experts fits.
why: VRAM matters because the GPU reads it at about 1 TB/s, forty times faster than it reads main memory over PCIe.
how: moe-local keeps attention, routers and embeddings in VRAM and fills the rest of it with slots for experts.
example: For example, a card with 24 GB of VRAM holds most of Mixtral's experts in NF4, but not all of them in 16 bits.
what? what (kind of memory|memory) (is|does) (on the card|the gpu have|vram) ; what does vram (mean|stand for) ; where does the gpu keep its data
why? why (is|do i need|does moe-local need|do you need) (vram|so much vram|much vram|more vram) (so |)(important|scarce|precious|fast|) ; why is (vram|gpu memory) (faster|better) (than ram|)
how? what (does moe-local keep|is kept|do you keep|is stored|goes|lies) in (vram|the gpu memory|gpu memory|the card) ; how (is|does moe-local use) (the |)vram (used|)

@ ram : pinned memory | pinned ram | host memory | system ram | page-locked memory | ram | main memory
what: Pinned RAM is main memory that the system may not swap out, so the GPU copies from it at full speed. Experts wait there.
why: Pinned memory matters because copies from ordinary memory are slower and can not run beside the computation.
how: moe-local reserves pinned RAM once, keeps each expert there as one flat buffer, and moves it with a single copy.
example: For example, all experts of Mixtral in NF4 wait in about 23 GB of RAM.
what? where (do|are) (the |)(other |cold |unused |)experts (wait|kept|stored|live) ; where (is|are) (an expert|experts) (that are not in vram|that is not in vram|before use)
what? what (is|does) pinned (mean|) ; what is (the|) (main|system) memory used for
why? why (is|do you use|use|does moe-local use) (pinned|page-locked) (memory|ram) ; why (not|can you not) use (normal|ordinary|pageable) memory
how? how (does moe-local use|is) (the |)ram (used|) ; how (are|is) (experts|an expert) (kept|stored|laid out) in ram
example? how much ram (do i need|does it need|is needed|does moe-local use|does it take) (for mixtral|)

@ disk : the disk tier | running from disk | an ssd | disk | the ssd | loading from disk | nvme
what: The disk tier is the last place for experts: what fits neither in VRAM nor in RAM is read from the SSD when needed.
why: The disk tier makes it possible to run models that are larger than your RAM, although an SSD is much slower.
how: RAM caches the disk just as VRAM caches RAM: an expert is read once into a RAM slot and stays there while it is used.
example: For example, DeepSeek-V3 is too big for most machines' RAM, so its experts are read from an SSD.
what? (can|could|may|do) (the |)experts (be|stay|live|lie|sit) on (the |a |my |)(disk|ssd|nvme|drive) ; what if (it does not fit in ram|i have too little ram|the model is larger than ram|my ram is too small)
what? what happens (when|if) (the model|it|a model|the experts) (does not fit in|do not fit in|is larger than|is too big for) (ram|my ram|main memory)
why? why would (i|one) (run|read) (experts|a model) from (disk|an ssd) ; is (an ssd|the disk) (slow|too slow|fast enough)
how? how (does|do) (it|moe-local) (read|load|use) (experts from disk|the ssd|from the ssd|the disk)

@ pcie : pcie | the pcie link | the pci express bus | pcie bandwidth | pci express | the bus | the link to the gpu
what: PCIe is the link between main memory and the graphics card. PCIe 4 with 16 lanes moves about 25 GB in a second.
why: PCIe matters because it is the bottleneck of offloading: every expert that is copied must cross it.
how: The GPU's copy engine reads pinned RAM over PCIe while the GPU computes, so well planned copies cost no extra time.
example: For example, one Mixtral expert in NF4 has 91 MB and takes about 4 ms over PCIe 4.
what? how (fast|quick) is (the|a|) (link|bus|pcie|pcie link|connection) ; what (connects|lies between) (the |)(gpu and ram|ram and gpu|gpu and the main memory|cpu and gpu) ; what is the bandwidth of pcie
why? (why|) is (pcie|the bus|the link|the pcie bus) (a|the|really a) (bottleneck|problem|limit) ; why is (copying|moving|transferring) experts (slow|expensive) ; what is the bottleneck
how? how (do|does|are) (experts|an expert|the bytes|the weights) (get|come|move|copied|travel) (to the gpu|into vram|from ram to vram|over pcie)
example? how long does (it take to copy an expert|a copy take|copying an expert take|one copy take)

@ offload : offloading | expert offloading | offload | weight offloading | moving experts to ram
what: Offloading keeps the large part of a model in RAM or on disk and brings it to the GPU only when it is needed.
why: Offloading lets you run models that are larger than your VRAM on an ordinary graphics card.
how: Offloading keeps attention and routers on the GPU and the experts in RAM, and copies or computes the experts that each token needs.
example: For example, Mixtral needs about 26 GB in NF4, and with offloading it runs on a card with 12 GB.
what? what does (it mean to offload|offload mean|offloaded mean) ; what is (an|) offloaded (model|expert)
why? (is|does) offloading (worth it|useful|help|a good idea|make sense) ; why (offload|would i offload|should i offload) (a model|experts|the experts|weights|)
why? (how|why) can (a|such a) (big|large|huge) model run on (a small card|my card|a small gpu|one gpu) ; what can i do if (a|the) model is (bigger|larger) than my (vram|gpu|card)
how? (which|what) part(s|) (stays|stay|is|are) (on|in) the (gpu|card) ; what (is|gets|do you|does moe-local) offload(ed|) ; (which|what) (stays|remains) on the gpu

@ kv : the kv cache | a kv cache | kv cache | key value cache | the key-value cache | keys and values
what: The KV cache stores the keys and values of earlier tokens, so that attention does not compute them again.
why: The KV cache matters because it saves work for each new token, but it takes more memory as the conversation grows.
how: In every layer each new token adds one key and one value to the KV cache, and attention reads all of them.
example: For example, the KV cache of Mixtral takes 128 KB for each token in 16 bits.
what? what (is|gets|are) (stored|kept|saved|put) in the (kv|key value) cache ; what do (the letters |)k and v (mean|stand for)
why? why (do|does|must|should) (i|we|you|a model|the model|attention) (need|store|keep) (a kv cache|the kv cache|keys and values) ; why does a (long|longer) (chat|conversation|text|context) need more memory
how? how does the kv cache (grow|work|help) ; how (big|large) (is|gets|becomes|can) the kv cache (get|become|)

@ context : the context | context length | the context window | a long context | the --context option
what: The context is all text that the model can look back at, counted in tokens. Its length limits the KV cache.
why: The context length matters because every token in it needs room in the KV cache, so a long context leaves fewer slots for experts.
how: Set the context length with --context. moe-local reserves room for that many tokens of keys and values.
example: For example, a context of 8192 tokens costs Mixtral about 1 GB for keys and values.
what? how (much|many) (can you|text can the model|can the model|tokens can the model) (remember|look back at|read|see) ; how long can (a|the|my) (prompt|chat|conversation|text) be
why? why (is|should) (a long|the|my) context (be |)(expensive|short|limited|small) ; why (limit|shorten|not use a huge) (the |)context
how? how (do|can) i (set|change|limit|shorten|increase) the (context|context length|context window|maximum length)

@ token : a token | tokens | the tokenizer | a tokenizer | tokenization
what: A token is a piece of text, often a word or a part of a word. Language models read and write text token by token.
why: Tokens matter because a model's speed is counted in them: each new token goes once through all layers.
how: A tokenizer cuts the text into pieces from a fixed list, and each piece has a number.
example: For example, the word prefetching may become two tokens: prefetch and ing.
what? what (are|is) (tokens|a token|the pieces) (really|in this context|in a language model|for a model) ; is a token a (word|letter|number|character)
how? how (is|does|are) (a |the |)(text|sentence|word|words|sentences) (become|turned into|split into|cut into|changed into) tokens ; how does (a|the) model read (text|words)

@ attention : attention | self-attention | the attention layer | attention layers | multi-head attention
what: Attention lets each token look at earlier tokens and collect what is useful. It belongs to the dense part of every layer.
why: Attention matters because it connects words over long distances. Every token needs it, so it always stays on the GPU.
how: Attention compares the query of a token with the keys of earlier tokens and mixes their values by these scores.
example: For example, attention finds out which earlier word the word it refers to.
what? what (is|does) (the|) attention (do|for|part) (in a model|in a layer|) ; what (lets|allows) tokens (look at|see) (each other|earlier tokens)
why? why (does|must) attention (stay|always stay|remain) on the gpu ; why (is|does) (attention|the attention) (not offloaded|never offloaded|important|needed)
how? how (do|does) (a token|tokens|the model) (look at|attend to|see|find) (earlier|other|previous) (tokens|words)

@ dense : the dense part | dense weights | the dense layers | the part that is not an expert
what: The dense part is everything that each token uses: attention, norms, routers, embeddings and shared experts.
why: The dense part is kept on the GPU because every token needs it, and it is only a few percent of the weights.
how: The dense part is loaded once by transformers and stays on the GPU. The option --dense chooses its number format.
example: For example, about 45 of Mixtral's 47 billion weights are experts, and less than 2 billion are dense.
what? (what|which) (weights|parts|layers) are (not experts|dense) ; what (is|lies) (beside|besides|outside) the experts
why? why (is|does) the dense part (stay|kept|not offloaded|remain) (on the gpu|in vram|) ; what share of the weights is dense
how? (how|where) is the dense part (loaded|kept|stored|handled) ; can i quantize (attention|the dense part|the dense weights)

@ layer : a layer | layers | a transformer layer | a decoder layer | a transformer block
what: A layer is one step of a model: attention first, then a feed-forward part, which in an MoE is a router with its experts.
why: Layers matter because each one refines the hidden state a little, so many layers together can understand difficult text.
how: A layer adds the output of attention to the hidden state, and then adds the output of the chosen experts.
example: For example, Mixtral has 32 layers, and this demo has five.
what? what (is|makes up|belongs to) (one|a single) layer ; what is a (transformer|model) made of
how? what (happens|goes on) in (a|one|each|every) layer ; in (which|what) order does a layer (work|compute)

@ ffn : the feed-forward network | a feed-forward network | a feed-forward layer | the ffn | an mlp
what: A feed-forward network is two or three matrices with a nonlinear function between them. An expert is such a network.
why: Feed-forward networks matter because they hold most of a model's weights and most of its knowledge.
how: A feed-forward network makes the token's vector wider, applies a function such as SiLU, and makes it narrow again.
example: For example, in Mixtral an expert widens the vector from 4096 to 14336 numbers and then shrinks it back.

@ weights : weights | parameters | model weights | a parameter | the weights of a model
what: Weights, also called parameters, are the numbers that a model learned in training. They are stored in its matrices.
why: Weights matter because they take almost all of the memory, and reading them takes almost all of the time.
how: A weight is multiplied by an input, and the products are added. Training changes the weights until the outputs are good.
example: For example, Mixtral has 46.7 billion weights, which are 93 GB in 16 bits.

@ llm : a language model | an llm | language models | llms | a large language model | a transformer
what: A language model predicts the next token of a text. Repeating this step writes whole answers.
why: Language models are useful because one model can answer questions, write text and help with code.
how: A language model turns tokens into vectors, passes them through many layers, and gives a score to every possible next token.
example: For example, Mixtral, Qwen3, gpt-oss and DeepSeek are large language models, and I am a very small one.
what? what does llm (mean|stand for) ; what is (a|the) transformer (model|) ; how does (a chatbot|a model) write (text|answers)

@ gpu : a gpu | gpus | the gpu | a graphics card | the graphics card | graphics cards
what: A GPU is a graphics card. It computes many numbers at the same time, which makes language models fast.
why: A GPU matters because it reads its own memory about ten times faster than a CPU reads main memory.
how: In moe-local the GPU runs attention, the routers and the experts that are in VRAM, while other experts are on their way.
example: For example, one consumer card with 24 GB is enough for Mixtral with moe-local.
what? what does (the|a) (gpu|graphics card) do ; what is (a|the) graphics card (for|used for)

@ cpu : the cpu | a cpu | computing on the cpu | cpu experts | the cpu kernel | the processor
what: The CPU is the main processor. moe-local lets it compute experts that are not in VRAM when that is cheaper than a copy.
why: The CPU helps because it reads RAM directly, so computing a missing expert there is often faster than copying it over PCIe.
how: The CPU kernel is small C++ code that reads an expert's NF4 weights from RAM and multiplies them at the memory's speed.
example: For example, the CPU may take 2 ms for a Mixtral expert whose copy over PCIe would take 4 ms.
what? (can|does|will) the cpu (compute|run|calculate) (an expert|experts|the experts|missing experts)
why? why (use|does moe-local use|would you use|compute on|run experts on) the cpu ; is the cpu (fast enough|faster than copying|faster than pcie)

@ mixtral : mixtral | mixtral 8x7b | mixtral-8x7b | the mixtral model | the model mixtral
what: Mixtral 8x7B is an MoE model by Mistral AI with 46.7 billion parameters, 32 layers and eight experts in each layer.
why: Mixtral is popular because it is open and strong, and only about 13 billion of its parameters work for each token.
how: Mixtral sends each token to two of eight experts in each of its 32 layers.
example: For example, moe-local chat mixtral-8x7b starts a conversation with Mixtral on a 24 GB card.
what? (who|which company) (made|built|trained|released|is behind) mixtral ; what (sort|kind|type) of model is mixtral

@ qwen : qwen3 | qwen3-30b-a3b | qwen | the qwen model | qwen3 30b
what: Qwen3-30B-A3B is an MoE model by Alibaba with 30 billion parameters, 48 layers and 128 experts in each layer.
why: Qwen3-30B-A3B is a good choice for small cards, because only about 3 billion parameters work for each token.
how: Qwen3-30B-A3B sends each token to eight of 128 small experts in each of its 48 layers.
example: For example, moe-local chat qwen3-30b-a3b is a good start on a card with 8 to 16 GB.
what? (who|which company) (made|built|trained|released) qwen(3|) ; how many experts (does qwen3 have|are in qwen3|has qwen3)

@ deepseek : deepseek | deepseek-v3 | deepseek v3 | the deepseek model
what: DeepSeek-V3 is a very large MoE model with 671 billion parameters and 256 experts in each MoE layer.
why: DeepSeek-V3 is one of the strongest open models, but it is so large that most machines must read its experts from disk.
how: DeepSeek-V3 runs one shared expert for all tokens and eight of 256 routed experts for each token.
example: For example, moe-local can run DeepSeek-V3 from an SSD, but you will wait for every token.
what? who (made|built|trained) deepseek ; can (i|you|moe-local) run deepseek ; how many experts (does deepseek have|are in deepseek|has deepseek)

@ gptoss : gpt-oss | gpt-oss-120b | gpt oss | the gpt-oss model | openai's open model
what: gpt-oss-120b is an open MoE model by OpenAI with 117 billion parameters, 36 layers and 128 experts in each layer.
why: gpt-oss-120b is interesting because it is strong, and only about 5 billion parameters work for each token.
how: gpt-oss-120b sends each token to four of 128 experts in each of its 36 layers.
example: For example, gpt-oss-120b can run with a card of 24 GB and 64 GB of RAM.
what? (is there|do you know|what is) (an open model|the open model|a model) (by|from|of) openai ; (who|which company) (made|built|trained|is behind) gpt-oss

@ ppl : perplexity | ppl | a perplexity score | model quality | the quality of a model
what: Perplexity measures how surprised a model is by a text. Lower is better, and one would be perfect.
why: Perplexity matters because it shows how much quality a quantized format costs.
how: Perplexity is the exponential of the mean negative log probability that the model gave to each token.
example: For example, if perplexity goes from 5.0 to 5.1 after quantization, very little was lost.
what? (is|should) (a |)(lower|higher|high|low|small|large) perplexity (good|better|bad|worse|be high|be low) ; what (does|is) (a|the) perplexity (of five|score|tell you) (mean|)
why? how (do|can) (i|you|we|one) (measure|see|judge|know) (quality|the quality|the loss of quality|how good a model is)

@ speed : tokens per second | tok/s | decoding speed | generation speed | throughput | the speed
what: Speed is counted in tokens per second. Ten tokens per second are about as fast as most people read.
why: Speed matters because you wait for each token, and with offloading most of the wait is moving experts.
how: Speed follows from bytes: the fewer expert bytes cross PCIe for each token, the more tokens per second you get.
example: For example, at one token the experts of Mixtral are 6 GB in NF4, so a card that reads 1 TB/s could do over 100 tokens per second.
what? how (fast|quick) (is|will|does|can) (it|moe-local|the model|generation) (be|run|go|generate|) ; what speed (can|will|should|do) i (expect|get|have)
how? what (limits|decides|determines) the speed ; what (makes it|is important to be) fast ; what does the speed depend on

@ slot : a slot | slots | cache slots | expert slots | the --slots option
what: A slot is a piece of fast memory that holds exactly one expert. The cache has a fixed number of slots.
why: Slots matter because memory is reserved once at the start, so nothing is allocated while tokens are generated.
how: A slot is loaded with an expert, leased while a kernel reads it, and given to another expert only after its last reader.
example: For example, with --slots 4 each MoE layer keeps four experts in the fastest memory.
what? what (is|does) (the option |the flag |)(slots|--slots) (do|mean|for) ; what (holds|contains) (one|an) expert in the cache
how? how many slots (should i use|do i need|are there|does it have|are best|can i set) ; how do i set the (slots|number of slots|number of experts in vram)

@ expert_file : the expert file | converted experts | an expert file | the converted model
what: The expert file holds a model's quantized experts on disk, one flat tensor for each expert, in safetensors shards.
why: The expert file is useful because the experts are quantized only once, and later starts just read them.
how: moe-local writes the expert file on first use or with moe-local convert. It is checked, and an interrupted run goes on later.
example: For example, the expert file of Mixtral in NF4 takes about 23 GB on disk.
what? (what|which files) does (convert|moe-local convert|moe-local) (write|make|create|produce) ; what is (written|saved|stored) on disk
why? why (is|does) (the model|it) (converted|convert the model|convert) (first|at all|) ; why (convert|do i have to convert) (a|the) model

@ safetensors : safetensors | a safetensors file | the safetensors format | model files | checkpoint files
what: safetensors is a simple file format for weights: a small header and raw bytes. It can not run code.
why: safetensors is useful because it is safe, and one tensor can be read without reading the whole file.
how: A safetensors file begins with the length of its header, then a JSON header with names and offsets, then the data.
example: For example, moe-local reads a safetensors checkpoint one expert at a time and quantizes it on the way.
what? (what|which) (file|weight|checkpoint) (format|formats|files) (do you|does it|does moe-local|can moe-local) (read|use|need|accept|support|load)
why? (is|are) (safetensors|a safetensors file|the files|model files) (safe|dangerous|secure) ; why (not|do you not) (use|load|read|accept) (pickle|pickled weights|bin files|pt files)

@ hub : the hub | hugging face | the hugging face hub | huggingface | a hub id
what: The Hugging Face Hub is a website that stores models. moe-local downloads models from it by their names.
why: The Hub is useful because almost every open model is there, with its weights, config and tokenizer.
how: Give moe-local a Hub id of the form owner/name, and it downloads the safetensors files into the usual Hub cache.
example: For example, moe-local pull mixtral-8x7b fetches the weights of Mixtral from the Hub.
what? where (do|does) (the models|the weights|models|moe-local get models) come from ; where (are|is) (the models|models|mixtral|the weights) (hosted|downloaded from)

@ shared : a shared expert | shared experts | the shared expert
what: A shared expert is an expert that runs for every token, whatever the router says. It belongs to the dense part.
why: Shared experts are useful because common knowledge is kept in one place and the routed experts can differ more.
how: The output of a shared expert is added to the output of the routed experts. It always stays on the GPU.
example: For example, DeepSeek-V3 has one shared expert in each MoE layer, and Mixtral has none.

@ sampling : sampling | temperature | the temperature | top-p | greedy decoding | sampling options
what: Sampling chooses the next token at random by the model's scores. A low temperature makes the choice more certain.
why: Sampling matters because it makes answers more varied, while greedy decoding always gives the same answer.
how: Sampling divides the scores by the temperature, keeps the likely tokens, and draws one of them.
example: For example, moe-local chat mixtral-8x7b --temperature 0.7 gives lively answers, and temperature 0 takes the best token.
what? what (is|does) (the |)(option |)(temperature|--temperature|top-p|--top-p|seed) (do|mean) ; what is (greedy|greedy decoding)
how? how (do|can) i (set|change|lower|raise) the (temperature|sampling|randomness) ; how (do|can) i (make|get) (the answers|answers) (more|less) (random|creative|varied)

@ batch : batching | a batch | batched requests | several users | many requests at once
what: Batching means that several conversations take each step together. One loaded expert then serves all of them.
why: Batching helps because an expert that was fetched once is used by every conversation that needs it.
how: In each step moe-local collects the experts that all conversations need, brings each one in once, and then computes.
example: For example, two users of moe-local serve whose tokens choose the same expert pay for only one copy.
what? (can|may|does it let) (several|many|two|more) (users|people|clients|requests) (use it|be served|talk) (at once|at the same time|together)
how? what happens (when|if) (two|several|many) (tokens|users|requests|conversations) need the same expert

@ bandwidth : bandwidth | memory bandwidth | the bandwidth | bandwidths
what: Bandwidth is how many bytes a memory or a link moves in a second. It limits how fast a model can run.
why: Bandwidth matters because for one user the time of a token is almost only the time to read its weights.
how: moe-local measures the bandwidth of VRAM, RAM, PCIe and disk once and uses the numbers to plan.
example: For example, VRAM may give 1000 GB/s, RAM 70 GB/s, PCIe 4 25 GB/s and an SSD 5 GB/s.

@ hidden : the hidden state | a hidden state | hidden states | the residual stream
what: The hidden state is the vector that stands for a token on its way through the layers. Every layer adds to it.
why: The hidden state matters because the router reads it to choose experts, and prefetch reads it to guess the next ones.
how: The hidden state starts as the token's embedding. Attention and experts add to it, layer after layer.
example: For example, a hidden state of Mixtral has 4096 numbers, and one of mine has 256.

@ embedding : an embedding | embeddings | the embedding | the embedding layer | token embeddings
what: An embedding is the vector that a model looks up for a token. It is the start of the hidden state.
why: Embeddings matter because a model computes with vectors, not with words. They are part of the dense weights.
how: The embedding layer is a table with one row for each token; the token's number selects the row.
example: For example, I have 2048 tokens, so my embedding table has 2048 rows of 256 numbers.

@ softmax : softmax | the softmax | a softmax | the softmax function
what: Softmax turns scores into positive weights that add up to one. Routers and attention use it.
why: Softmax is useful because it makes scores comparable and lets the best ones dominate smoothly.
how: Softmax takes the exponential of each score and divides it by the sum of all of them.
example: For example, softmax turns the scores 2 and 1 into the weights 0.73 and 0.27.

@ inference : inference | running a model | decoding | generating text | text generation | generation
what: Inference means using a trained model: it reads your text and writes new tokens one after another.
why: Inference matters because it is what you wait for. moe-local makes it possible on a small card.
how: In each step of inference the last token goes through all layers, and the scores at the end choose the next token.
example: For example, when you type a question here, my answer is made by inference, one token at a time.

@ ttft : time to first token | ttft | the first token | prompt processing | prefill
what: Time to first token is how long you wait before an answer begins. In that time the model reads your prompt.
why: Time to first token matters because a long wait before the first word feels slow, even if the rest is fast.
how: The whole prompt goes through each layer at once, so almost every expert is needed, and all of them must be brought in.
example: For example, the first answer after a start takes longer, because the cache of experts is still empty.

@ nn : a neural network | neural networks | deep learning | machine learning | a neural net | ml
what: A neural network is a chain of simple computations whose weights were learned from examples. Language models are neural networks.
why: Neural networks are useful because they learn from examples what nobody could write down as rules.
how: A neural network multiplies its input by weights, applies a simple function, and repeats this layer by layer.
example: For example, an expert is a small neural network with three matrices.

@ moelocal : moe-local | moe local | this tool | this program | this project | this software | moelocal
what: moe-local runs large Mixture-of-Experts models on one ordinary graphics card that is too small to hold them.
why: moe-local is useful because it lets you run models that are larger than your VRAM, such as Mixtral on a 24 GB card.
how: moe-local keeps the dense part on the GPU and the quantized experts in RAM, caches the useful ones in VRAM and prefetches the next.
example: For example, type moe-local chat mixtral-8x7b and start to talk.
what? what (is|does) (this|it) (for|all about|do) ; what (can|does|will) moe-local do (for me|) ; (what|who) is moe-local for ; what is the (goal|purpose|aim) of (moe-local|this project)
why? why (should i use|would i use|use|did you build|choose) (moe-local|this tool|this) ; what (problem does|is the benefit of|makes) moe-local (solve|special|good|)
how? how does (moe-local|it|this) (manage to |)(run|fit|handle) (a |such |)(big|large|huge) models (on one gpu|on a small card|)
"""
