/**
What is to be captured of a pod: the one shape that every source of it (annotations, pods file) is turned into, and that the plan of map entries
is made from. Types only.
*/
import type {Mark} from '../maps/schema.js';

/** What is to be captured of a pod, before its addresses are known. */
export interface Capture {
	readonly mode: 'proxy' | 'ambient' | 'sidecar';
	readonly exempt: {readonly marks: readonly Mark[]; readonly uids: readonly number[]; readonly gids: readonly number[]; readonly cgroups: readonly string[]};
	readonly outbound: {
		/** Where captured connections go. */
		readonly port: number;
		/** At most one a family; the pod's own when left out. */
		readonly addresses?: readonly string[];
		/** Destination ports, 1 to 65535; sidecar only. */
		readonly excludePorts: readonly number[];
		readonly includePorts: readonly number[];
		readonly excludeRanges: readonly Cidr[];
		/** '*' is everything. */
		readonly includeRanges: '*' | readonly Cidr[];
	};
	/** Left out: nothing inbound is captured. */
	readonly inbound?: {
		readonly port: number;
		readonly includePorts: '*' | readonly number[];
		readonly excludePorts: readonly number[];
		/** What comes from the node's own network namespace passes (kubelet's probes). */
		readonly passNode: boolean;
	};
	/** Left out: DNS is like other traffic. */
	readonly dns?: {readonly port: number};
	/** The proxy binds the client's address towards the application: its replies have to come back over lo. */
	readonly keepSource: boolean;
	readonly excludeInterfaces: readonly string[];
	/** Whether bytes between the pod's sockets and others of the node may go past the TCP stack; `on` also where the probes were not content. */
	readonly acceleration?: 'off' | 'auto' | 'on';
	/** Sidecar only: whose sockets are the proxy's. */
	readonly proxy?: {readonly uid: number; readonly gid: number};
}

/** `address` is canonical (maps/address.ts) with the host bits cleared; `bits` counts in the address's own family (0-32 or 0-128). */
export interface Cidr {
	readonly address: string;
	readonly bits: number;
}
