// Draws the tokens of the rows whose draws are not greedy, after `oxl_draw_best`.
//
// Grid (rows with logits); blocks beyond the step's draws end at once. A row's block takes the groups
// of tokens that reach a bar above which the wanted number of tokens lies, sorts their tokens, cuts
// and draws. Weights of ranked tokens are whole multiples of 2^-44 of the best one's: their sums are
// exact, and nothing depends on the order in which tokens are found.
//
// Floor: a few hundred tokens from the L2, three times there and back (1 us), and sorting them (28
// steps for 100 tokens, 1 us). A row whose kept tokens are many more than looked at first (a
// flat distribution under top-p) costs two passes of one block over the row, about 5 us each at
// 128,256 logits, for each further thousand tokens; a draw from beyond the first ranks of a row
// without cuts up to one such pass.
#include "draws.cuh"

namespace {

using namespace draws;

// Tokens that are sorted at once.
constexpr int CAPACITY = 4096;
// Ranks that are looked at first where top-k does not say how many are needed: with cuts, and
// without, where the rest is passed in the order of ids: `oxllama_backend::FIRST_RANKS`.
constexpr uint32_t FIRST_RANKS_CUT = 128;
constexpr uint32_t FIRST_RANKS = 64;
// The same for further looks.
constexpr uint32_t MORE_RANKS = 1024;
// Above every token.
constexpr uint64_t EVERYTHING = ~uint64_t(0);
// A weight of 1: 2^44.
constexpr double ONE = 17592186044416.0;

struct Shared {
    // Tokens as `ranked` gives them.
    uint64_t list[CAPACITY];
    Partials partials;
    DrawSettings settings;
    uint32_t listed;
    uint32_t group_count;
    // Groups that reach the bar.
    uint16_t groups[THREADS * OWN_GROUPS];
};

// A row that is being finished.
struct Row {
    const DrawArgs& args;
    Shared& shared;
    int64_t index;
    float* logits;
    // [groups]
    uint64_t* group_bests;
    int groups;
    uint64_t best;

    __device__ int drawable() const { return int(shared.settings.drawable); }

    // A ranked token's weight; the best one's is 1.
    __device__ double weight(uint64_t token, float scale) const {
        const double distance = double(logit_of(token)) - double(logit_of(best));
        return exp(double(scale) * distance);
    }

    // The same in whole multiples of 1 / ONE.
    __device__ uint64_t mass(uint64_t token, float scale) const {
        return uint64_t(weight(token, scale) * ONE);
    }

    // The best token below `frontier` of every group, anew.
    __device__ void look_below(uint64_t frontier) {
        const int lanes = args.group_lanes;
        const int groups_per_slice = THREADS / lanes;
        for (int slice = 0; slice < groups / groups_per_slice; ++slice) {
            uint64_t own = 0;
#pragma unroll
            for (int piece = 0; piece < PIECES; ++piece) {
                const int first = slice * SLICE + piece * PIECE + 4 * threadIdx.x;
                const Four four = load_logits(logits, first, args.width);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint64_t token = ranked(four.at[i], first + i);
                    if (first + i < drawable() && token < frontier) own = larger(own, token);
                }
            }
            for (int distance = 1; distance < lanes; distance *= 2) {
                own = larger(own, swapped(own, distance));
            }
            if (threadIdx.x % lanes == 0) {
                group_bests[slice * groups_per_slice + threadIdx.x / lanes] = own;
            }
        }
        __syncthreads();
    }

    // A bar that between `count` and twice as many groups reach, or 1 if there are no more.
    __device__ uint64_t bar(const uint64_t (&own)[OWN_GROUPS], uint32_t count) {
        // More than twice `count` reach `low`, less than `count` reach `high`. Bests are all
        // different, so the number cannot jump past what is asked for.
        uint64_t low = 1;
        uint64_t high = best + 1;
        uint64_t middle = low;
        for (;;) {
            uint32_t reached = 0;
#pragma unroll
            for (int i = 0; i < OWN_GROUPS; ++i) reached += own[i] >= middle;
            reached = block_count(reached, shared.partials);
            if (reached < count && middle > 1) {
                high = middle;
            } else if (reached > 2 * count) {
                low = middle;
            } else {
                return middle;
            }
            middle = low + (high - low) / 2;
        }
    }

    // Appends all tokens from `bar` up to `frontier`, without, in any order.
    __device__ void list_groups(const uint64_t (&own)[OWN_GROUPS], uint64_t bar,
                                uint64_t frontier) {
#pragma unroll
        for (int i = 0; i < OWN_GROUPS; ++i) {
            if (own[i] >= bar) {
                const uint32_t slot = atomicAdd(&shared.group_count, 1u);
                shared.groups[slot] = uint16_t(i * THREADS + int(threadIdx.x));
            }
        }
        __syncthreads();
        const int group_piece = 4 * args.group_lanes;
        const int group_tokens = PIECES * group_piece;
        const int groups_per_slice = THREADS / args.group_lanes;
        const int end = int(shared.group_count) * group_tokens;
        for (int index = threadIdx.x; index < end; index += THREADS) {
            const int group = shared.groups[index / group_tokens];
            const int place = index % group_tokens;
            const int id = group / groups_per_slice * SLICE +
                           group % groups_per_slice * group_piece +
                           place / group_piece * PIECE + place % group_piece;
            if (id >= drawable()) continue;
            const uint64_t token = ranked(__ldcg(logits + id), id);
            if (token >= bar && token < frontier) {
                const uint32_t slot = atomicAdd(&shared.listed, 1u);
                if (slot < CAPACITY) shared.list[slot] = token;
            }
        }
    }

    // Sorts `list[first..first + size]`, the best first; `size` is a power of two.
    __device__ void sort(uint32_t first, uint32_t size) {
        uint64_t* list = shared.list + first;
        for (uint32_t run = 2; run <= size; run *= 2) {
            for (uint32_t distance = run / 2; distance > 0; distance /= 2) {
                for (uint32_t pair = threadIdx.x; pair < size / 2; pair += THREADS) {
                    const uint32_t inside = pair & (distance - 1);
                    const uint32_t a = 2 * (pair - inside) + inside;
                    const uint64_t x = list[a];
                    const uint64_t y = list[a + distance];
                    if ((x < y) == ((a & run) == 0)) {
                        list[a] = y;
                        list[a + distance] = x;
                    }
                }
                __syncthreads();
            }
        }
    }

    // Appends the best tokens below `frontier` to the `listed` tokens of the list, in order:
    // `count` and more, less only if they would not fit. `group_bests` must be those below
    // `frontier`. Returns how many are listed now; as many as before: there were none.
    __device__ uint32_t list_more(uint32_t listed, uint32_t count, uint64_t frontier) {
        uint64_t own[OWN_GROUPS];
#pragma unroll
        for (int i = 0; i < OWN_GROUPS; ++i) {
            const int group = i * THREADS + int(threadIdx.x);
            own[i] = group < groups ? __ldcg(group_bests + group) : 0;
        }
        for (;; count = (count + 1) / 2) {
            const uint64_t least = bar(own, count);
            if (threadIdx.x == 0) {
                shared.listed = listed;
                shared.group_count = 0;
            }
            __syncthreads();
            list_groups(own, least, frontier);
            __syncthreads();
            const uint32_t end = shared.listed;
            __syncthreads();
            if (end == listed) return listed;
            uint32_t size = 1;
            while (size < end - listed) size *= 2;
            // A single group always fits.
            if (listed + size > CAPACITY) continue;
            for (uint32_t at = end + threadIdx.x; at < listed + size; at += THREADS) {
                shared.list[at] = 0;
            }
            __syncthreads();
            sort(listed, size);
            return end;
        }
    }

    // The mass of the first `listed` tokens of the list.
    __device__ uint64_t list_mass(uint32_t listed, float scale) {
        uint64_t sum = 0;
        for (uint32_t at = threadIdx.x; at < listed; at += THREADS) {
            sum += mass(shared.list[at], scale);
        }
        return block_combined(sum, shared.partials.words);
    }

    // How many of the `listed` tokens of the list stay; `reached` is the mass before them, and
    // after them in the end. The row's best token always stays.
    __device__ uint32_t kept(uint32_t listed, uint64_t& reached, double wanted) {
        const bool has_share = cuts_by_share(shared.settings);
        if (!has_share && !(shared.settings.min_p > 0.0f)) return listed;
        for (uint32_t first = 0; first < listed; first += THREADS) {
            const uint32_t at = first + threadIdx.x;
            const bool is_token = at < listed;
            const uint64_t token = is_token ? shared.list[at] : best;
            const double own = weight(token, shared.settings.cut_scale);
            const uint64_t own_mass = is_token ? uint64_t(own * ONE) : 0;
            uint64_t total;
            const uint64_t before = reached + block_scan(own_mass, total, shared.partials) - own_mass;
            const bool is_dropped = token != best && ((has_share && !(double(before) < wanted)) ||
                                                      own < double(shared.settings.min_p));
            const uint32_t end = block_least(is_dropped ? at : listed, shared.partials);
            if (end < listed) return end;
            reached += total;
        }
        return listed;
    }

    // The first of the `listed` tokens of the list with which the summed mass exceeds `target`, or
    // `listed`; then `target` becomes what is missing.
    __device__ uint32_t at_mass(uint32_t listed, uint64_t& target) {
        for (uint32_t first = 0; first < listed; first += THREADS) {
            const uint32_t at = first + threadIdx.x;
            const uint64_t own = at < listed ? mass(shared.list[at], shared.settings.draw_scale) : 0;
            uint64_t total;
            const uint64_t reached = block_scan(own, total, shared.partials);
            const uint32_t found = block_least(at < listed && reached > target ? at : listed,
                                               shared.partials);
            if (found < listed) return found;
            target -= total;
        }
        return listed;
    }

    // A token's mass in the tail, where there are too many to be exact.
    __device__ uint64_t tail_mass(uint64_t token, uint64_t frontier) const {
        if (token == 0 || token >= frontier) return 0;
        const float distance = __fsub_rn(logit_of(token), logit_of(best));
        return uint64_t(expf(__fmul_rn(shared.settings.draw_scale, distance)) * float(ONE));
    }

    // Takes the draw's changed tokens out of the row.
    __device__ void hide_changes(const LogitChange* changes) {
        for (uint32_t at = threadIdx.x; at < shared.settings.change_count; at += THREADS) {
            const uint32_t token_id = changes[at].token_id;
            if (token_id < shared.settings.drawable) logits[token_id] = negative_infinity();
        }
        __syncthreads();
    }

    // The token with which the summed mass of the tokens below `frontier` exceeds `target`: by id,
    // but changed ones after all others in the order of their changes. The last with any mass if
    // rounding has left too little; the row's best if none has. The row is as before but for
    // changed tokens, which are negative infinity.
    __device__ uint64_t in_tail(uint64_t frontier, uint64_t target) {
        const DrawSettings& settings = shared.settings;
        const LogitChange* changes = changes_of(args, settings);
        const float* saved = args.saved + index * args.most_changes;
        const int rows_end = (drawable() + PIECE - 1) / PIECE * PIECE;
        const int end = rows_end + int(settings.change_count);
        hide_changes(changes);
        // The last place so far that has any mass, after the place's own number, and its token.
        uint64_t last = 0;
        int last_place = 0;
        for (int start = 0; start < end; start += PIECE) {
            const int first = start + 4 * int(threadIdx.x);
            Four four;
            if (start < rows_end) four = load_logits(logits, first, args.width);
            uint64_t tokens[4];
            uint64_t masses[4];
            uint64_t own = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint64_t token = 0;
                if (start < rows_end) {
                    if (first + i < drawable()) token = ranked(four.at[i], first + i);
                } else if (first + i < end) {
                    const int at = first + i - rows_end;
                    const LogitChange change = changes[at];
                    if (change.token_id < settings.drawable) {
                        const float logit = changed(settings, change, __ldcg(saved + at));
                        token = ranked(logit, int(change.token_id));
                    }
                }
                tokens[i] = token;
                masses[i] = tail_mass(token, frontier);
                own += masses[i];
            }
            uint64_t total;
            uint64_t reached = block_scan(own, total, shared.partials) - own;
            uint64_t found = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                reached += masses[i];
                if (masses[i] == 0) continue;
                last = tokens[i];
                last_place = first + i + 1;
                if (reached > target && found == 0) found = tokens[i];
            }
            if (total > target) return first_of_block(found, found != 0 ? threadIdx.x : NOWHERE);
            target -= total;
        }
        // The greatest place, inverted so that the smallest is wanted.
        const uint32_t inverse = last_place > 0 ? NOWHERE - uint32_t(last_place) : NOWHERE;
        const uint64_t token = first_of_block(last, inverse);
        return token != 0 ? token : best;
    }

    // The token of the thread whose `order` is the smallest, in every thread; 0 if all are NOWHERE.
    __device__ uint64_t first_of_block(uint64_t token, uint32_t order) {
        const uint32_t least = block_least(order, shared.partials);
        if (least == NOWHERE) return 0;
        if (order == least) shared.partials.words[0] = token;
        __syncthreads();
        token = shared.partials.words[0];
        __syncthreads();
        return token;
    }

    // A draw's share of a mass, below it.
    __device__ uint64_t target_of(uint64_t total) const {
        const uint64_t target = uint64_t(shared.settings.random * double(total));
        return target < total ? target : total - 1;
    }

    // Draws; `total` is the mass of all tokens where `mass_scale` asks for it.
    //
    // Walks down the ranks, as many at a time as are listed: at first for the mass of what the
    // cuts keep, then, if the list has moved on, again for the token that is drawn.
    __device__ uint64_t draw(double total) {
        const uint32_t top_k = shared.settings.top_k;
        const bool has_cuts = cuts(shared.settings);
        uint32_t count = top_k > 0 ? top_k : has_cuts ? FIRST_RANKS_CUT : FIRST_RANKS;
        double wanted = total * ONE * double(shared.settings.top_p);
        uint64_t frontier = EVERYTHING;
        uint32_t listed = 0;
        uint64_t reached = 0;
        uint64_t kept_mass = 0;
        uint64_t target = 0;
        bool is_first = true;
        bool has_moved_on = false;
        bool is_cut = false;
        for (;;) {
            if (!is_first) look_below(frontier);
            is_first = false;
            const uint32_t end = list_more(listed, count, frontier);
            const bool is_open = end > listed;
            listed = end;
            if (listed < top_k && is_open) {
                // Of top-k all are listed together.
                frontier = shared.list[listed - 1];
                count = top_k - listed;
                continue;
            }
            if (!is_cut) {
                uint32_t kept_here = listed;
                if (!has_cuts) {
                    // Fewer: they are all there are.
                    const bool are_all = listed < FIRST_RANKS;
                    if (!are_all) kept_here = FIRST_RANKS;
                    kept_mass = list_mass(kept_here, shared.settings.draw_scale);
                    if (!are_all) kept_mass = larger(kept_mass, uint64_t(total * ONE));
                } else {
                    if (top_k > 0) {
                        if (listed > top_k) listed = top_k;
                        const double mass = double(list_mass(listed, shared.settings.cut_scale));
                        wanted = mass * double(shared.settings.top_p);
                    }
                    kept_here = kept(listed, reached, wanted);
                    kept_mass += list_mass(kept_here, shared.settings.draw_scale);
                    if (top_k == 0 && is_open && kept_here == listed) {
                        frontier = shared.list[listed - 1];
                        listed = 0;
                        count = MORE_RANKS;
                        has_moved_on = true;
                        continue;
                    }
                }
                listed = kept_here;
                target = target_of(kept_mass);
                is_cut = true;
                if (has_moved_on) {
                    frontier = EVERYTHING;
                    listed = 0;
                    count = MORE_RANKS;
                    continue;
                }
            }
            const uint32_t found = at_mass(listed, target);
            if (found < listed) return shared.list[found];
            // Kept weights are added up exactly: past them is only what was never ranked.
            if (!has_cuts) return in_tail(shared.list[listed - 1], target);
            if (listed == 0) return best;
            frontier = shared.list[listed - 1];
            listed = 0;
            count = MORE_RANKS;
        }
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(draws::THREADS, 1)
    oxl_draw_random(const __grid_constant__ DrawArgs args) {
    __shared__ Shared shared;
    const int64_t index = blockIdx.x;
    oxl::dependency_trigger();
    oxl::dependency_wait();
    if (index >= args.header->count) return;
    if (threadIdx.x == 0) shared.settings = settings_of(args, index);
    const uint64_t best = __ldcg(&args.summaries[index].best);
    __syncthreads();
    // The kernel before has finished it.
    if (best == 0 || !(shared.settings.draw_scale > 0.0f)) return;
    float* logits = args.logits + (args.header->first_row + index) * args.width;
    const int groups = args.slices_per_row * (THREADS / args.group_lanes);
    uint64_t* group_bests = args.group_bests + index * groups;
    Row row = {args, shared, index, logits, group_bests, groups, best};
    const uint64_t drawn = row.draw(double(__ldcg(&args.summaries[index].mass)));
    // Nobody reads the changed logits any more.
    __syncthreads();
    restore(args, shared.settings, index, logits);
    if (threadIdx.x == 0) args.drawn[index] = id_of(drawn);
}
