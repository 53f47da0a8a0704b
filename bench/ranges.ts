/** Every second network of 16 bits, so that no two can be merged, and none contains another. */
const NETWORKS: readonly string[] = Array.from({length: 223 * 128}, (_, index) => `${1 + (index >> 7)}.${(2 * (index & 127)) + 1}`)
	.filter(network => !/^127\.|^10\.77$/.test(network));
/** Shares no factor with their number, so each comes once, and they are scattered. */
const STEP = 7919;

/** So many ranges, none of them in 10.77.0.0/16, with 16 to 32 bits. */
export function scatteredRanges(count: number): readonly string[] {
	return Array.from({length: count}, (_, index) => {
		const bits = 16 + (index % 17);
		const host = bits === 16 ? 0 : (index * 40_503 & 0xffff) >> (32 - bits) << (32 - bits);
		return `${NETWORKS[index * STEP % NETWORKS.length]!}.${host >> 8}.${host & 0xff}/${bits}`;
	});
}
