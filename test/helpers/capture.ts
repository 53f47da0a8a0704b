/** The two ways of capturing a pod that every case is run under: the reference, and ours. */
import type {Agent, Pod} from './world.js';

export const PROXY_PORT = 15_001;
export const PROXY_MARK = 0x539;
export const PROXY_UID = 1337;
export const PROXY_GID = 1338;

export const EXEMPT = {marks: ['0x539/0xfff'], uids: [PROXY_UID], gids: [PROXY_GID]};

/** CAPTURE.md section 3 as iptables rules: all outbound TCP that is not routed over lo goes to the proxy's port, but for the proxy's own. */
export function captureByIptables(pod: Pod, port = PROXY_PORT): void {
	for (const iptables of ['iptables', 'ip6tables']) {
		const rule = (...words: string[]) => pod.must(iptables, '-w', '-t', 'nat', '-A', 'OUTPUT', '-p', 'tcp', ...words);
		rule('-m', 'mark', '--mark', '0x539/0xfff', '-j', 'RETURN');
		rule('-m', 'owner', '--uid-owner', String(PROXY_UID), '-j', 'RETURN');
		rule('-m', 'owner', '--gid-owner', String(PROXY_GID), '-j', 'RETURN');
		rule('-o', 'lo', '-j', 'RETURN');
		rule('-j', 'REDIRECT', '--to-ports', String(port));
	}
}

/** An entry of the pods file. */
export function podEntry(pod: Pod, extra: object = {}): object {
	return {name: `test/${pod.name}`, netns: pod.netns, proxy: {port: PROXY_PORT}, exempt: EXEMPT, ...extra};
}

export async function captureBySidestep(...pods: readonly Pod[]): Promise<Agent> {
	return pods[0]!.world.agent(pods.map(pod => podEntry(pod)));
}
