/**
One client action each, for every row of the contract that iptables gives today (CAPTURE.md), with what the rules make of it. Grouped by how the pod is
captured, so that one pair of pods serves a whole group.
*/
import type {SidecarOptions} from '../helpers/istio-rules.js';
import type {As} from '../helpers/world.js';

/** Which listener of the proxy it reaches first; or past the proxy; or neither. */
export type Expectation = 'outbound' | 'inbound' | 'tunnel' | 'dns' | 'direct' | 'refused' | 'fails';

export interface Case {
	/** The row of the contract. */
	readonly row: string;
	readonly title: string;
	/** `FAR4`, `OWN4` and so on stand for addresses. Several: connected to in turn and kept; resolvers are asked over one socket. */
	readonly to: string | readonly string[];
	readonly options?: readonly string[];
	/** A DNS query instead of a connection that is greeted and echoed. */
	readonly dns?: true;
	/** By default the pod itself. */
	readonly from?: 'far' | 'node';
	readonly as?: As;
	readonly expect: Expectation;
	/** What the client has in the end; by default `ok`, or ECONNREFUSED where that is expected. */
	readonly outcome?: string;
	/** Where the README says that sidestep does otherwise: what it does. */
	readonly differs?: {readonly expect: Expectation; readonly outcome: string};
}

export interface Variant {
	readonly title: string;
	readonly mode: 'ambient' | 'sidecar';
	/** The node's default. */
	readonly dns?: boolean;
	/** ambient.istio.io/… */
	readonly ambient?: {readonly 'dns-capture'?: string; readonly 'bypass-inbound-capture'?: string};
	/** traffic.sidecar.istio.io/… */
	readonly sidecar?: SidecarOptions;
	/** Whether the pods have a second interface. */
	readonly net1?: true;
	readonly noProxy?: true;
	readonly cases: readonly Case[];
}

const MAPPED = ['--family', 'mapped'];
const PROXY_UID: As = {uid: 1337, gid: 2000};
const PROXY_GID: As = {uid: 2000, gid: 1337};
const PROXY_BOTH: As = {uid: 1337, gid: 1337};
const OTHER: As = {uid: 2000, gid: 2000};

const AMBIENT_OUT: readonly Case[] = [
	{row: 'O6', title: 'IPv4', to: 'FAR4:8080', expect: 'outbound'},
	{row: 'O6', title: 'IPv6', to: '[FAR6]:8080', expect: 'outbound'},
	{row: 'O6', title: 'IPv4 from an IPv6 socket', to: 'FAR4:8080', options: MAPPED, expect: 'outbound'},
	{row: 'O6', title: 'non-blocking', to: 'FAR4:8080', options: ['--nonblock'], expect: 'outbound'},
	{row: 'O6', title: 'non-blocking, IPv6', to: '[FAR6]:8080', options: ['--nonblock'], expect: 'outbound'},
	{row: 'O6', title: 'bound address', to: 'FAR4:8080', options: ['--bind', 'OWN4:0'], expect: 'outbound'},
	{row: 'O6', title: 'bound address, IPv6', to: '[FAR6]:8080', options: ['--bind', '[OWN6]:0'], expect: 'outbound'},
	{row: 'O6', title: 'bound address, IPv4 from an IPv6 socket', to: 'FAR4:8080', options: [...MAPPED, '--bind', '[::ffff:OWN4]:0'], expect: 'outbound'},
	{row: 'O6', title: 'bound second address', to: 'FAR4:8080', options: ['--bind', 'SECOND4:0'], expect: 'outbound'},
	{row: 'O6', title: 'bound second address, IPv6', to: '[FAR6]:8080', options: ['--bind', '[SECOND6]:0'], expect: 'outbound'},
	{row: 'O6', title: 'bound port', to: 'FAR4:8080', options: ['--bind', '0.0.0.0:20124'], expect: 'outbound'},
	{row: 'O6', title: 'bound address and port', to: '[FAR6]:8080', options: ['--bind', '[OWN6]:20123'], expect: 'outbound'},
	// Towards the proxy the two are one tuple: conntrack gives the second another source port.
	{row: 'O6', title: 'one port to two destinations', to: ['FAR4:8080', 'FARB4:8080'], options: ['--bind', '0.0.0.0:20124', '--reuseport'], expect: 'outbound', differs: {expect: 'outbound', outcome: 'EADDRNOTAVAIL'}},
	{row: 'O6', title: 'one address and port to two destinations', to: ['FAR4:8080', 'FARB4:8080'], options: ['--bind', 'OWN4:20124', '--reuseport'], expect: 'outbound', differs: {expect: 'outbound', outcome: 'ok'}},
	{row: 'O6', title: 'bound to 127.0.0.1', to: 'FAR4:8080', options: ['--bind', '127.0.0.1:0'], expect: 'fails', outcome: 'EINVAL'},
	{row: 'O6', title: 'bound to ::1', to: '[FAR6]:8080', options: ['--bind', '[::1]:0'], expect: 'outbound'},
	{row: 'O6', title: 'nobody there: the proxy accepts and closes', to: 'FAR4:9', expect: 'outbound', outcome: 'EOF'},
	{row: 'O6', title: 'nobody there, IPv6', to: '[FAR6]:9', expect: 'outbound', outcome: 'EOF'},
	{row: 'O6', title: 'somebody else\'s 15008', to: 'FAR4:15008', expect: 'outbound'},
	{row: 'O6', title: 'somebody else\'s 15001', to: 'FAR4:15001', expect: 'outbound'},
	{row: 'O6', title: 'uid and gid of a sidecar', to: 'FAR4:8080', as: PROXY_BOTH, expect: 'outbound'},
	{row: 'O6', title: 'DNS over TLS', to: 'FAR4:853', expect: 'outbound'},
	{row: 'O6', title: 'the proxy\'s mark', to: 'FAR4:8080', options: ['--mark', '0x539'], expect: 'direct'},
	{row: 'O6', title: 'the proxy\'s mark, IPv6', to: '[FAR6]:8080', options: ['--mark', '0x539'], expect: 'direct'},
	{row: 'O6', title: 'the proxy\'s mark, IPv4 from an IPv6 socket', to: 'FAR4:8080', options: [...MAPPED, '--mark', '0x539'], expect: 'direct'},
	{row: 'O6', title: 'the proxy\'s mark and bits beyond its mask', to: 'FAR4:8080', options: ['--mark', '0x7000539'], expect: 'direct'},
	{row: 'O6', title: 'nearly the proxy\'s mark', to: 'FAR4:8080', options: ['--mark', '0x538'], expect: 'outbound'},
	{row: 'O6', title: 'more than the proxy\'s mark within its mask', to: 'FAR4:8080', options: ['--mark', '0xd39'], expect: 'outbound'},
	{row: 'O6', title: 'the mark of replies: routed to the pod itself, from no address', to: 'FAR4:8080', options: ['--mark', '0x111'], expect: 'fails', outcome: 'ENETUNREACH'},
	{row: 'O6', title: 'the mark of replies and a bound address, IPv6', to: '[FAR6]:8080', options: ['--mark', '0x111', '--bind', '[OWN6]:0'], expect: 'refused'},
	{row: 'O5', title: '127.0.0.1', to: '127.0.0.1:8081', expect: 'direct'},
	{row: 'O5', title: '127.0.0.1 from an IPv6 socket', to: '127.0.0.1:8081', options: MAPPED, expect: 'direct'},
	{row: 'O5', title: '127.0.0.6', to: '127.0.0.6:8081', expect: 'direct'},
	{row: 'O5', title: '127.0.0.1 from 127.0.0.6', to: '127.0.0.1:8081', options: ['--bind', '127.0.0.6:0'], expect: 'direct'},
	{row: 'O5', title: '::1', to: '[::1]:8081', expect: 'direct'},
	{row: 'O5', title: 'the unspecified address', to: '0.0.0.0:8081', expect: 'direct'},
	{row: 'O5', title: 'the unspecified address, IPv6', to: '[::]:8081', expect: 'direct'},
	{row: 'O5', title: 'own address', to: 'OWN4:8081', expect: 'direct'},
	{row: 'O5', title: 'own address, IPv6', to: '[OWN6]:8081', expect: 'direct'},
	{row: 'O5', title: 'own address from an IPv6 socket', to: 'OWN4:8081', options: MAPPED, expect: 'direct'},
	{row: 'O5', title: 'own second address', to: 'SECOND4:8081', expect: 'direct'},
	{row: 'O5', title: 'own second address, IPv6', to: '[SECOND6]:8082', expect: 'direct'},
	{row: 'O5', title: 'own address from the second', to: 'OWN4:8081', options: ['--bind', 'SECOND4:0'], expect: 'direct'},
	{row: 'O5', title: 'own address, with the proxy\'s mark', to: 'OWN4:8081', options: ['--mark', '0x539'], expect: 'direct'},
	{row: 'O5', title: 'own address where nobody listens', to: 'OWN4:9', expect: 'refused'},
	{row: 'O5', title: 'own 15008', to: 'OWN4:15008', expect: 'tunnel'},
	{row: 'O5', title: 'own 15001: the proxy closes', to: 'OWN4:15001', expect: 'outbound', outcome: 'EOF'},
	{row: 'O5', title: '15006 by 127.0.0.1: the proxy closes', to: '127.0.0.1:15006', expect: 'inbound', outcome: 'EOF'},
	{row: '-', title: 'UDP', to: 'FAR4:5353', dns: true, expect: 'direct'},
	{row: '-', title: 'UDP, IPv6', to: '[FAR6]:5353', dns: true, expect: 'direct'},
	{row: '-', title: 'UDP, own address', to: 'OWN4:5353', dns: true, expect: 'direct'},
];

const AMBIENT_IN: readonly Case[] = [
	{row: 'P2', title: 'IPv4', from: 'far', to: 'OWN4:8081', expect: 'inbound'},
	{row: 'P2', title: 'IPv6', from: 'far', to: '[OWN6]:8081', expect: 'inbound'},
	{row: 'P2', title: 'IPv4, the application listens on [::]', from: 'far', to: 'OWN4:8082', expect: 'inbound'},
	{row: 'P2', title: 'IPv6, the application listens on [::]', from: 'far', to: '[OWN6]:8082', expect: 'inbound'},
	{row: 'P2', title: 'second address', from: 'far', to: 'SECOND4:8081', expect: 'inbound'},
	{row: 'P2', title: 'second address, IPv6', from: 'far', to: '[SECOND6]:8082', expect: 'inbound'},
	{row: 'P2', title: 'from a second address', from: 'far', to: 'OWN4:8081', options: ['--bind', 'FARB4:0'], expect: 'inbound'},
	{row: 'P2', title: 'from a second address, IPv6', from: 'far', to: '[OWN6]:8081', options: ['--bind', '[FARB6]:0'], expect: 'inbound'},
	{row: 'P2', title: 'from a bound port', from: 'far', to: 'OWN4:8081', options: ['--bind', '0.0.0.0:20123'], expect: 'inbound'},
	{row: 'P2', title: 'nobody listens: the proxy accepts and closes', from: 'far', to: 'OWN4:9', expect: 'inbound', outcome: 'EOF'},
	{row: 'P2', title: 'nobody listens, IPv6', from: 'far', to: '[OWN6]:9', expect: 'inbound', outcome: 'EOF'},
	{row: 'P2', title: 'a mark of another namespace means nothing', from: 'far', to: 'OWN4:8081', options: ['--mark', '0x539'], expect: 'inbound'},
	{row: 'P2', title: 'DNS over TCP', from: 'far', to: 'OWN4:53', dns: true, options: ['--tcp'], expect: 'inbound'},
	{row: 'P2', title: '15006 itself', from: 'far', to: 'OWN4:15006', expect: 'inbound', outcome: 'EOF'},
	{row: 'P2', title: '15001 from outside', from: 'far', to: 'OWN4:15001', expect: 'inbound', outcome: 'EOF'},
	{row: 'P2', title: '15053 from outside', from: 'far', to: '[OWN6]:15053', expect: 'inbound', outcome: 'EOF'},
	{row: '15008', title: 'IPv4', from: 'far', to: 'OWN4:15008', expect: 'tunnel'},
	{row: '15008', title: 'IPv6', from: 'far', to: '[OWN6]:15008', expect: 'tunnel'},
	{row: '15008', title: 'from the node', from: 'node', to: 'OWN4:15008', expect: 'tunnel'},
	{row: '-', title: 'UDP inbound', from: 'far', to: 'OWN4:5353', dns: true, expect: 'direct'},
	{row: '-', title: 'UDP 53 inbound', from: 'far', to: '[OWN6]:53', dns: true, expect: 'direct'},
	{row: 'P1', title: 'IPv4', from: 'node', to: 'OWN4:8081', expect: 'direct'},
	{row: 'P1', title: 'IPv6', from: 'node', to: '[OWN6]:8081', expect: 'direct'},
	{row: 'P1', title: 'IPv4 from an IPv6 socket', from: 'node', to: 'OWN4:8082', options: MAPPED, expect: 'direct'},
	{row: 'P1', title: 'nobody listens', from: 'node', to: 'OWN4:9', expect: 'refused'},
];

const AMBIENT_WITHOUT_DNS: readonly Case[] = [
	{row: '-', title: 'DNS is not captured, UDP', to: 'FAR4:53', dns: true, expect: 'direct'},
	{row: '-', title: 'DNS is not captured, UDP, IPv6, unconnected', to: '[FAR6]:53', dns: true, options: ['--unconnected'], expect: 'direct'},
	{row: 'O6', title: 'DNS over TCP is TCP', to: 'FAR4:53', dns: true, options: ['--tcp'], expect: 'outbound'},
];

const AMBIENT_DNS: readonly Case[] = [
	{row: 'O2', title: 'connected', to: 'FAR4:53', dns: true, expect: 'dns'},
	{row: 'O2', title: 'connected, IPv6', to: '[FAR6]:53', dns: true, expect: 'dns'},
	{row: 'O2', title: 'connected, IPv4 from an IPv6 socket', to: 'FAR4:53', dns: true, options: MAPPED, expect: 'dns'},
	{row: 'O2', title: 'unconnected', to: 'FAR4:53', dns: true, options: ['--unconnected'], expect: 'dns'},
	{row: 'O2', title: 'unconnected, IPv6', to: '[FAR6]:53', dns: true, options: ['--unconnected'], expect: 'dns'},
	{row: 'O2', title: 'unconnected, IPv4 from an IPv6 socket', to: 'FAR4:53', dns: true, options: ['--unconnected', ...MAPPED], expect: 'dns'},
	{row: 'O2', title: 'bound address', to: 'FAR4:53', dns: true, options: ['--bind', 'OWN4:0'], expect: 'dns'},
	{row: 'O2', title: 'bound address, unconnected, IPv6', to: '[FAR6]:53', dns: true, options: ['--unconnected', '--bind', '[OWN6]:0'], expect: 'dns'},
	// Under sidestep its own address is 127.0.0.1 then.
	{row: 'O2', title: 'bound port', to: 'FAR4:53', dns: true, options: ['--bind', '0.0.0.0:20124'], expect: 'dns', differs: {expect: 'dns', outcome: 'ok'}},
	{row: 'O2', title: 'two resolvers, reconnected', to: ['FAR4:53', 'FARB4:53'], dns: true, expect: 'dns'},
	{row: 'O2', title: 'two resolvers, one after the other', to: ['FAR4:53', 'FARB4:53'], dns: true, options: ['--unconnected'], expect: 'dns'},
	// Under sidestep both answers seem to come from the one that was asked last.
	{row: 'O2', title: 'two resolvers at once', to: ['FAR4:53', 'FARB4:53'], dns: true, options: ['--together'], expect: 'dns', differs: {expect: 'dns', outcome: 'ok'}},
	{row: 'O2', title: 'a resolver and another service on one socket', to: ['FAR4:53', 'FAR4:5353'], dns: true, options: ['--unconnected'], expect: 'dns'},
	{row: 'O2', title: 'uid of a sidecar', to: 'FAR4:53', dns: true, as: PROXY_BOTH, expect: 'dns'},
	{row: 'O2', title: 'nearly the proxy\'s mark', to: 'FAR4:53', dns: true, options: ['--mark', '0x538'], expect: 'dns'},
	{row: 'O2', title: 'the proxy\'s mark', to: 'FAR4:53', dns: true, options: ['--mark', '0x539'], expect: 'direct'},
	{row: 'O2', title: 'the proxy\'s mark, unconnected, IPv6', to: '[FAR6]:53', dns: true, options: ['--unconnected', '--mark', '0x539'], expect: 'direct'},
	{row: 'O2', title: '127.0.0.1', to: '127.0.0.1:53', dns: true, expect: 'direct'},
	{row: 'O2', title: '127.0.0.53, unconnected', to: '127.0.0.53:53', dns: true, options: ['--unconnected'], expect: 'direct'},
	{row: 'O2', title: '::1', to: '[::1]:53', dns: true, expect: 'direct'},
	{row: 'O2', title: 'own address', to: 'OWN4:53', dns: true, expect: 'direct'},
	{row: 'O2', title: 'own address, unconnected, IPv6', to: '[OWN6]:53', dns: true, options: ['--unconnected'], expect: 'direct'},
	{row: 'O3', title: 'IPv4', to: 'FAR4:53', dns: true, options: ['--tcp'], expect: 'dns'},
	{row: 'O3', title: 'IPv6', to: '[FAR6]:53', dns: true, options: ['--tcp'], expect: 'dns'},
	{row: 'O3', title: 'IPv4 from an IPv6 socket', to: 'FAR4:53', dns: true, options: ['--tcp', ...MAPPED], expect: 'dns'},
	{row: 'O3', title: 'bound address', to: 'FAR4:53', dns: true, options: ['--tcp', '--bind', 'OWN4:0'], expect: 'dns'},
	{row: 'O3', title: 'own address', to: 'OWN4:53', dns: true, options: ['--tcp'], expect: 'dns'},
	{row: 'O3', title: 'own address, IPv6', to: '[OWN6]:53', dns: true, options: ['--tcp'], expect: 'dns'},
	{row: 'O3', title: '127.0.0.53', to: '127.0.0.53:53', dns: true, options: ['--tcp'], expect: 'dns'},
	{row: 'O3', title: '127.0.0.1', to: '127.0.0.1:53', dns: true, options: ['--tcp'], expect: 'direct'},
	{row: 'O3', title: '::1', to: '[::1]:53', dns: true, options: ['--tcp'], expect: 'direct'},
	{row: 'O3', title: 'the proxy\'s mark', to: 'FAR4:53', dns: true, options: ['--tcp', '--mark', '0x539'], expect: 'direct'},
	// Under sidestep this mark passes everything, and what passes with it is routed to the pod itself.
	{row: 'O3', title: 'the mark of replies', to: 'FAR4:53', dns: true, options: ['--tcp', '--mark', '0x111', '--bind', 'OWN4:0'], expect: 'dns', differs: {expect: 'fails', outcome: 'TIMEOUT'}},
	{row: 'O3', title: 'from far: inbound, not DNS', from: 'far', to: 'OWN4:53', dns: true, options: ['--tcp'], expect: 'inbound'},
	{row: '-', title: 'UDP to another port', to: 'FAR4:5353', dns: true, expect: 'direct'},
	{row: 'O6', title: 'TCP to another port', to: 'FAR4:8080', expect: 'outbound'},
];

const SIDECAR: readonly Case[] = [
	{row: 'A14', title: 'IPv4', to: 'FAR4:8080', expect: 'outbound'},
	{row: 'A14', title: 'IPv6', to: '[FAR6]:8080', expect: 'outbound'},
	{row: 'A14', title: 'IPv4 from an IPv6 socket', to: 'FAR4:8080', options: MAPPED, expect: 'outbound'},
	{row: 'A14', title: 'non-blocking', to: 'FAR4:8080', options: ['--nonblock'], expect: 'outbound'},
	{row: 'A14', title: 'bound address', to: '[FAR6]:8080', options: ['--bind', '[OWN6]:0'], expect: 'outbound'},
	{row: 'A14', title: 'another uid and gid', to: 'FAR4:8080', as: OTHER, expect: 'outbound'},
	{row: 'A14', title: 'ztunnel\'s mark means nothing', to: 'FAR4:8080', options: ['--mark', '0x539'], expect: 'outbound'},
	{row: 'A14', title: 'nobody there', to: 'FAR4:9', expect: 'outbound', outcome: 'EOF'},
	{row: 'A14', title: 'DNS over TCP is TCP', to: 'FAR4:53', dns: true, options: ['--tcp'], expect: 'outbound'},
	{row: 'A14', title: 'somebody else\'s 15008', to: 'FAR4:15008', expect: 'outbound'},
	{row: 'A15', title: 'UDP', to: 'FAR4:5353', dns: true, expect: 'direct'},
	{row: 'A15', title: 'UDP 53', to: 'FAR4:53', dns: true, expect: 'direct'},
	{row: 'A15', title: 'UDP 53, unconnected, IPv6', to: '[FAR6]:53', dns: true, options: ['--unconnected'], expect: 'direct'},
	{row: 'A5', title: 'the proxy\'s uid', to: 'FAR4:8080', as: PROXY_UID, expect: 'direct'},
	{row: 'A5', title: 'the proxy\'s uid, IPv6', to: '[FAR6]:8080', as: PROXY_UID, expect: 'direct'},
	{row: 'A5', title: 'the proxy\'s uid, IPv4 from an IPv6 socket', to: 'FAR4:8080', options: MAPPED, as: PROXY_UID, expect: 'direct'},
	{row: 'A8', title: 'the proxy\'s gid', to: 'FAR4:8080', as: PROXY_GID, expect: 'direct'},
	{row: 'A8', title: 'the proxy\'s gid, IPv6', to: '[FAR6]:8080', as: PROXY_GID, expect: 'direct'},
	{row: 'A2', title: 'the proxy from 127.0.0.6', to: 'OWN4:8081', options: ['--bind', '127.0.0.6:0'], as: PROXY_BOTH, expect: 'direct'},
	{row: 'A2', title: 'the proxy from ::6', to: '[OWN6]:8081', options: ['--bind', '[::6]:0'], as: PROXY_BOTH, expect: 'direct'},
	{row: 'A2', title: 'an application from 127.0.0.6', to: 'OWN4:8081', options: ['--bind', '127.0.0.6:0'], as: OTHER, expect: 'direct'},
	{row: 'A3', title: 'own address', to: 'OWN4:8081', as: PROXY_BOTH, expect: 'inbound'},
	{row: 'A3', title: 'own address, IPv6', to: '[OWN6]:8081', as: PROXY_BOTH, expect: 'inbound'},
	{row: 'A3', title: 'own address from an IPv6 socket', to: 'OWN4:8081', options: MAPPED, as: PROXY_BOTH, expect: 'inbound'},
	{row: 'A3', title: 'own second address', to: 'SECOND4:8081', as: PROXY_UID, expect: 'inbound'},
	{row: 'A3', title: 'elsewhere in 127/8', to: '127.0.0.2:8081', as: PROXY_UID, expect: 'inbound'},
	{row: 'A3', title: 'Istio\'s own check, from 127.0.0.1 to 127.0.0.6:15002', to: '127.0.0.6:15002', options: ['--bind', '127.0.0.1:0'], as: PROXY_BOTH, expect: 'inbound'},
	{row: 'A3', title: '127.0.0.6', to: '127.0.0.6:8081', as: PROXY_BOTH, expect: 'inbound'},
	{row: 'A3', title: '::6 from ::1', to: '[::6]:8082', options: ['--bind', '[::1]:0'], as: PROXY_BOTH, expect: 'inbound'},
	{row: 'A2', title: '::6, whose source is ::6 then', to: '[::6]:8082', as: PROXY_BOTH, expect: 'direct'},
	{row: 'A3', title: 'own port 53', to: 'OWN4:53', dns: true, options: ['--tcp'], as: PROXY_BOTH, expect: 'inbound'},
	{row: 'A3', title: 'own address where nobody listens', to: 'OWN4:9', as: PROXY_BOTH, expect: 'inbound', outcome: 'EOF'},
	{row: 'A5', title: 'own 15008', to: 'OWN4:15008', as: PROXY_BOTH, expect: 'direct'},
	{row: 'A5', title: '127.0.0.1', to: '127.0.0.1:8081', as: PROXY_BOTH, expect: 'direct'},
	{row: 'A5', title: '::1', to: '[::1]:8081', as: PROXY_BOTH, expect: 'direct'},
	{row: 'A5', title: 'the unspecified address', to: '0.0.0.0:8081', as: PROXY_BOTH, expect: 'direct'},
	{row: 'A4', title: 'an application to its own address', to: 'OWN4:8081', as: OTHER, expect: 'direct'},
	{row: 'A4', title: 'an application to its own address, IPv6', to: '[OWN6]:8081', as: OTHER, expect: 'direct'},
	{row: 'A4', title: 'an application to 127.0.0.6', to: '127.0.0.6:8081', expect: 'direct'},
	{row: 'A4', title: 'an application to ::6', to: '[::6]:8082', expect: 'direct'},
	{row: 'A4', title: 'the proxy\'s gid alone, own address', to: 'OWN4:8081', as: PROXY_GID, expect: 'direct'},
	{row: 'A4', title: 'own 15006: the proxy closes', to: 'OWN4:15006', as: OTHER, expect: 'inbound', outcome: 'EOF'},
	{row: 'A4', title: 'UDP to its own address', to: 'OWN4:53', dns: true, expect: 'direct'},
	{row: 'in', title: 'IPv4', from: 'far', to: 'OWN4:8081', expect: 'inbound'},
	{row: 'in', title: 'IPv6', from: 'far', to: '[OWN6]:8081', expect: 'inbound'},
	{row: 'in', title: 'IPv4, the application listens on [::]', from: 'far', to: 'OWN4:8082', expect: 'inbound'},
	{row: 'in', title: 'second address, IPv6', from: 'far', to: '[SECOND6]:8082', expect: 'inbound'},
	{row: 'in', title: 'nobody listens', from: 'far', to: 'OWN4:9', expect: 'inbound', outcome: 'EOF'},
	{row: 'in', title: '15008', from: 'far', to: 'OWN4:15008', expect: 'direct'},
	{row: 'in', title: '15008, IPv6', from: 'far', to: '[OWN6]:15008', expect: 'direct'},
	{row: 'in', title: '15020', from: 'far', to: 'OWN4:15020', expect: 'direct'},
	{row: 'in', title: '15021', from: 'far', to: '[OWN6]:15021', expect: 'direct'},
	{row: 'in', title: '15090', from: 'far', to: 'OWN4:15090', expect: 'direct'},
	{row: 'in', title: '15001 from outside', from: 'far', to: 'OWN4:15001', expect: 'inbound', outcome: 'EOF'},
	{row: 'in', title: 'from the node: probes are not let past', from: 'node', to: 'OWN4:8081', expect: 'inbound'},
	{row: 'in', title: 'from the node, IPv6', from: 'node', to: '[OWN6]:8081', expect: 'inbound'},
	{row: 'in', title: 'UDP', from: 'far', to: 'OWN4:53', dns: true, expect: 'direct'},
];

const SIDECAR_LISTS: readonly Case[] = [
	{row: 'A14', title: 'in an included range', to: 'FARB4:8080', expect: 'outbound'},
	{row: 'A14', title: 'in an included range, IPv6', to: '[FARB6]:8080', expect: 'outbound'},
	{row: 'A14', title: 'in an included range, from an IPv6 socket', to: 'FARB4:8080', options: MAPPED, expect: 'outbound'},
	{row: 'A14', title: 'the last of an included range', to: '10.77.0.175:8080', expect: 'outbound'},
	{row: 'A14', title: 'the last of an included range, IPv6', to: '[fd77::af]:8080', expect: 'outbound'},
	{row: 'A15', title: 'just beyond an included range', to: '10.77.0.176:8080', expect: 'direct'},
	{row: 'A15', title: 'just beyond an included range, IPv6', to: '[fd77::b0]:8080', expect: 'direct'},
	{row: 'A15', title: 'outside of every range', to: 'FAR4:8080', expect: 'direct'},
	{row: 'A15', title: 'outside of every range, IPv6', to: '[FAR6]:8080', expect: 'direct'},
	{row: 'A13', title: 'an included port', to: 'FAR4:9000', expect: 'outbound'},
	{row: 'A13', title: 'an included port, IPv6', to: '[FAR6]:9000', expect: 'outbound'},
	{row: 'A12', title: 'excluded inside of an included range', to: 'FARC4:8080', expect: 'direct'},
	{row: 'A12', title: 'excluded inside of an included range, IPv6', to: '[FARC6]:8080', expect: 'direct'},
	{row: 'A12', title: 'excluded inside of an included range, from an IPv6 socket', to: 'FARC4:8080', options: MAPPED, expect: 'direct'},
	{row: 'A12', title: 'an included port of an excluded range', to: 'FARC4:9000', expect: 'direct'},
	{row: 'A1', title: 'an excluded port', to: 'FARB4:8443', expect: 'direct'},
	{row: 'A1', title: 'an excluded port, IPv6', to: '[FARB6]:8443', expect: 'direct'},
	{row: 'A1', title: 'the proxy\'s own traffic to an excluded port of the pod', to: 'OWN4:8443', as: PROXY_BOTH, expect: 'direct'},
	{row: 'A3', title: 'the proxy to its own address, in no range', to: 'OWN4:8081', as: PROXY_BOTH, expect: 'inbound'},
	{row: 'A5', title: 'the proxy to an included range', to: 'FARB4:8080', as: PROXY_BOTH, expect: 'direct'},
	{row: 'A11', title: 'an included port on 127.0.0.1', to: '127.0.0.1:9000', expect: 'direct'},
	{row: 'A15', title: 'UDP to an included port', to: 'FAR4:5353', dns: true, expect: 'direct'},
	{row: 'in', title: 'a listed port', from: 'far', to: 'OWN4:8081', expect: 'inbound'},
	{row: 'in', title: 'a listed port, IPv6', from: 'far', to: '[OWN6]:8081', expect: 'inbound'},
	{row: 'in', title: 'the proxy\'s 15020, when listed', from: 'far', to: 'OWN4:15020', expect: 'inbound'},
	{row: 'in', title: 'a port that is not listed', from: 'far', to: 'OWN4:8082', expect: 'direct'},
	{row: 'in', title: 'a port that is not listed, IPv6', from: 'far', to: '[OWN6]:8082', expect: 'direct'},
	{row: 'in', title: '15008, though listed', from: 'far', to: 'OWN4:15008', expect: 'direct'},
	{row: 'in', title: 'nobody listens, not listed', from: 'far', to: 'OWN4:9', expect: 'refused'},
];

const SIDECAR_EXCLUDES: readonly Case[] = [
	{row: 'A12', title: 'all of IPv4', to: 'FAR4:8080', expect: 'direct'},
	{row: 'A12', title: 'all of IPv4, from an IPv6 socket', to: 'FAR4:8080', options: MAPPED, expect: 'direct'},
	{row: 'A14', title: 'IPv6 is not excluded with it', to: '[FAR6]:8080', expect: 'outbound'},
	{row: 'A12', title: 'a range of IPv6', to: '[FARB6]:8080', expect: 'direct'},
	{row: 'A3', title: 'the proxy to its own address', to: 'OWN4:8081', as: PROXY_BOTH, expect: 'inbound'},
	{row: 'in', title: 'an excluded port', from: 'far', to: 'OWN4:8082', expect: 'direct'},
	{row: 'in', title: 'an excluded port, IPv6', from: 'far', to: '[OWN6]:8082', expect: 'direct'},
	{row: 'in', title: 'excluded by the injector beside the list', from: 'far', to: 'OWN4:15021', expect: 'direct'},
	{row: 'in', title: 'another port', from: 'far', to: 'OWN4:8081', expect: 'inbound'},
];

const SIDECAR_NOTHING: readonly Case[] = [
	{row: 'A15', title: 'outbound', to: 'FAR4:8080', expect: 'direct'},
	{row: 'A15', title: 'outbound, IPv6', to: '[FAR6]:8080', expect: 'direct'},
	{row: 'in', title: 'inbound', from: 'far', to: 'OWN4:8081', expect: 'direct'},
	{row: 'in', title: 'inbound, IPv6', from: 'far', to: '[OWN6]:8081', expect: 'direct'},
	{row: 'A3', title: 'the proxy to its own address', to: 'OWN4:8081', as: PROXY_BOTH, expect: 'inbound'},
];

const SIDECAR_LOOPBACK: readonly Case[] = [
	{row: 'A4', title: 'an application to 127.0.0.2: out, and in again', to: '127.0.0.2:8081', as: OTHER, expect: 'outbound'},
	{row: 'A4', title: 'an application to its own address: out, and in again', to: 'OWN4:8081', as: OTHER, expect: 'outbound'},
	{row: 'A4', title: 'own address from an IPv6 socket', to: 'OWN4:8081', options: MAPPED, as: OTHER, expect: 'outbound'},
	{row: 'A15', title: 'own address of the other family, in no range', to: '[OWN6]:8081', as: OTHER, expect: 'direct'},
	{row: 'A11', title: '127.0.0.1', to: '127.0.0.1:8081', as: OTHER, expect: 'direct'},
	{row: 'A11', title: '::1', to: '[::1]:8081', as: OTHER, expect: 'direct'},
	{row: 'A6', title: 'the proxy\'s gid alone, own address', to: 'OWN4:8081', as: PROXY_GID, expect: 'inbound'},
	{row: 'A6', title: 'the proxy\'s gid alone, own address, IPv6', to: '[OWN6]:8081', as: PROXY_GID, expect: 'inbound'},
	{row: 'A8', title: 'the proxy\'s gid alone, own 15008', to: 'OWN4:15008', as: PROXY_GID, expect: 'direct'},
	{row: 'A3', title: 'the proxy\'s uid, own address', to: 'OWN4:8081', as: PROXY_UID, expect: 'inbound'},
	{row: 'A2', title: 'from 127.0.0.6', to: 'OWN4:8081', options: ['--bind', '127.0.0.6:0'], as: OTHER, expect: 'direct'},
	{row: 'A14', title: 'elsewhere', to: 'FAR4:8080', expect: 'outbound'},
	{row: 'A15', title: 'elsewhere, IPv6', to: '[FAR6]:8080', expect: 'direct'},
];

const SIDECAR_DNS: readonly Case[] = [
	{row: 'A10', title: 'UDP, connected', to: 'FAR4:53', dns: true, expect: 'dns'},
	{row: 'A10', title: 'UDP, connected, IPv6', to: '[FAR6]:53', dns: true, expect: 'dns'},
	{row: 'A10', title: 'UDP, connected, IPv4 from an IPv6 socket', to: 'FAR4:53', dns: true, options: MAPPED, expect: 'dns'},
	{row: 'A10', title: 'UDP, unconnected', to: 'FAR4:53', dns: true, options: ['--unconnected'], expect: 'dns'},
	{row: 'A10', title: 'UDP, unconnected, IPv6', to: '[FAR6]:53', dns: true, options: ['--unconnected'], expect: 'dns'},
	{row: 'A10', title: 'UDP, two resolvers', to: ['FAR4:53', 'FARB4:53'], dns: true, options: ['--unconnected'], expect: 'dns'},
	{row: 'A10', title: 'UDP to 127.0.0.1', to: '127.0.0.1:53', dns: true, expect: 'dns'},
	{row: 'A10', title: 'UDP to 127.0.0.53, unconnected', to: '127.0.0.53:53', dns: true, options: ['--unconnected'], expect: 'dns'},
	{row: 'A10', title: 'UDP to ::1', to: '[::1]:53', dns: true, expect: 'dns'},
	{row: 'A10', title: 'UDP to its own address', to: 'OWN4:53', dns: true, expect: 'dns'},
	{row: 'A10', title: 'UDP to its own address, unconnected, IPv6', to: '[OWN6]:53', dns: true, options: ['--unconnected'], expect: 'dns'},
	{row: 'A10', title: 'TCP', to: 'FAR4:53', dns: true, options: ['--tcp'], expect: 'dns'},
	{row: 'A10', title: 'TCP, IPv6', to: '[FAR6]:53', dns: true, options: ['--tcp'], expect: 'dns'},
	{row: 'A10', title: 'TCP to 127.0.0.1', to: '127.0.0.1:53', dns: true, options: ['--tcp'], expect: 'dns'},
	{row: 'A10', title: 'TCP to ::1', to: '[::1]:53', dns: true, options: ['--tcp'], expect: 'dns'},
	{row: 'A10', title: 'TCP to its own address', to: 'OWN4:53', dns: true, options: ['--tcp'], expect: 'dns'},
	{row: 'A5', title: 'the proxy\'s uid, UDP', to: 'FAR4:53', dns: true, as: PROXY_UID, expect: 'direct'},
	{row: 'A5', title: 'the proxy\'s uid, UDP, unconnected, IPv6', to: '[FAR6]:53', dns: true, options: ['--unconnected'], as: PROXY_UID, expect: 'direct'},
	{row: 'A5', title: 'the proxy\'s uid, TCP', to: 'FAR4:53', dns: true, options: ['--tcp'], as: PROXY_UID, expect: 'direct'},
	{row: 'A5', title: 'the proxy\'s uid, own address, TCP', to: 'OWN4:53', dns: true, options: ['--tcp'], as: PROXY_UID, expect: 'direct'},
	{row: 'A5', title: 'the proxy\'s uid, own address, UDP', to: 'OWN4:53', dns: true, as: PROXY_UID, expect: 'direct'},
	{row: 'A6', title: 'the proxy\'s gid alone, own address, TCP', to: 'OWN4:53', dns: true, options: ['--tcp'], as: PROXY_GID, expect: 'inbound'},
	{row: 'A8', title: 'the proxy\'s gid alone, own address, UDP', to: 'OWN4:53', dns: true, as: PROXY_GID, expect: 'direct'},
	{row: 'A8', title: 'the proxy\'s gid alone, UDP', to: 'FAR4:53', dns: true, as: PROXY_GID, expect: 'direct'},
	{row: 'A4', title: 'TCP to its own address', to: 'OWN4:8081', as: OTHER, expect: 'direct'},
	{row: 'A15', title: 'UDP to another port', to: 'FAR4:5353', dns: true, expect: 'direct'},
	{row: 'A15', title: 'UDP to another port of its own', to: 'OWN4:5353', dns: true, expect: 'direct'},
	{row: 'A14', title: 'TCP to another port', to: 'FAR4:853', expect: 'outbound'},
	{row: 'in', title: 'UDP 53', from: 'far', to: 'OWN4:53', dns: true, expect: 'direct'},
];

const SIDECAR_DNS_EXCLUDED: readonly Case[] = [
	{row: 'A1', title: 'port 53 excluded, UDP', to: 'FAR4:53', dns: true, expect: 'direct'},
	{row: 'A1', title: 'port 53 excluded, UDP, unconnected, IPv6', to: '[FAR6]:53', dns: true, options: ['--unconnected'], expect: 'direct'},
	{row: 'A1', title: 'port 53 excluded, TCP', to: 'FAR4:53', dns: true, options: ['--tcp'], expect: 'direct'},
	{row: 'A5', title: 'the proxy\'s uid, own port 53', to: 'OWN4:53', dns: true, options: ['--tcp'], as: PROXY_UID, expect: 'direct'},
	{row: 'A14', title: 'another port', to: 'FAR4:8080', expect: 'outbound'},
];

const SIDECAR_INTERFACE: readonly Case[] = [
	{row: 'A0', title: 'IPv4', to: 'NET4:8080', expect: 'direct'},
	{row: 'A0', title: 'IPv6', to: '[NET6]:8080', expect: 'direct'},
	{row: 'A0', title: 'IPv4 from an IPv6 socket', to: 'NET4:8080', options: MAPPED, expect: 'direct'},
	{row: 'A0', title: 'bound to the interface', to: 'NET4:8080', options: ['--device', 'net1'], expect: 'direct'},
	{row: 'A0', title: 'bound to the interface, to where another one leads', to: 'FAR4:8080', options: ['--device', 'net1'], expect: 'direct'},
	{row: 'A0', title: 'UDP 53', to: 'NET4:53', dns: true, expect: 'direct'},
	{row: 'A0', title: 'UDP 53, unconnected, IPv6', to: '[NET6]:53', dns: true, options: ['--unconnected'], expect: 'direct'},
	{row: 'A0', title: 'TCP 53', to: 'NET4:53', dns: true, options: ['--tcp'], expect: 'direct'},
	{row: 'A14', title: 'multicast: the stack refuses it', to: '224.0.0.1:8080', expect: 'fails', outcome: 'ENETUNREACH'},
	{row: 'A14', title: 'multicast, IPv6', to: '[ff02::1]:8080', expect: 'fails', outcome: 'ENETUNREACH'},
	{row: 'A14', title: 'another interface', to: 'FAR4:8080', expect: 'outbound'},
	{row: 'A14', title: 'another interface, IPv6', to: '[FAR6]:8080', expect: 'outbound'},
	{row: 'A10', title: 'another interface, DNS', to: 'FAR4:53', dns: true, expect: 'dns'},
	{row: 'A3', title: 'the proxy to its address on the interface goes over lo', to: 'NETOWN4:8081', as: PROXY_BOTH, expect: 'inbound'},
	{row: 'A4', title: 'an application to its address on the interface', to: '[NETOWN6]:8082', as: OTHER, expect: 'direct'},
	{row: 'in', title: 'IPv4 by the interface', from: 'far', to: 'NETOWN4:8081', expect: 'direct'},
	{row: 'in', title: 'IPv6 by the interface', from: 'far', to: '[NETOWN6]:8082', expect: 'direct'},
	{row: 'in', title: 'IPv4 by another interface', from: 'far', to: 'OWN4:8081', expect: 'inbound'},
	{row: 'in', title: 'IPv6 by another interface', from: 'far', to: '[OWN6]:8081', expect: 'inbound'},
];

export const VARIANTS: readonly Variant[] = [
	{title: 'ambient', mode: 'ambient', cases: [...AMBIENT_OUT, ...AMBIENT_IN, ...AMBIENT_WITHOUT_DNS]},
	{title: 'ambient, DNS', mode: 'ambient', dns: true, cases: AMBIENT_DNS},
	{title: 'ambient, DNS by annotation', mode: 'ambient', ambient: {'dns-capture': 'true'}, cases: AMBIENT_DNS.slice(0, 6)},
	{title: 'ambient, no DNS by annotation', mode: 'ambient', dns: true, ambient: {'dns-capture': 'false'}, cases: AMBIENT_WITHOUT_DNS},
	{title: 'ambient, inbound bypassed', mode: 'ambient', ambient: {'bypass-inbound-capture': 'true'}, cases: [
		{row: 'bypass', title: 'inbound', from: 'far', to: 'OWN4:8081', expect: 'direct'},
		{row: 'bypass', title: 'inbound, IPv6', from: 'far', to: '[OWN6]:8081', expect: 'direct'},
		{row: 'bypass', title: 'nobody listens', from: 'far', to: 'OWN4:9', expect: 'refused'},
		{row: 'bypass', title: 'from the node', from: 'node', to: 'OWN4:8081', expect: 'direct'},
		{row: '15008', title: 'IPv4', from: 'far', to: 'OWN4:15008', expect: 'tunnel'},
		{row: '15008', title: 'IPv6', from: 'far', to: '[OWN6]:15008', expect: 'tunnel'},
		{row: 'O5', title: 'own address', to: 'OWN4:8081', expect: 'direct'},
		{row: 'O6', title: 'outbound', to: 'FAR4:8080', expect: 'outbound'},
		{row: 'O6', title: 'outbound, IPv6', to: '[FAR6]:8080', expect: 'outbound'},
	]},
	{title: 'ambient, no proxy', mode: 'ambient', dns: true, noProxy: true, cases: [
		{row: 'closed', title: 'outbound', to: 'FAR4:8080', expect: 'refused'},
		{row: 'closed', title: 'outbound, IPv6', to: '[FAR6]:8080', expect: 'refused'},
		{row: 'closed', title: 'outbound, IPv4 from an IPv6 socket', to: 'FAR4:8080', options: MAPPED, expect: 'refused'},
		{row: 'closed', title: 'outbound, non-blocking', to: '[FAR6]:8080', options: ['--nonblock'], expect: 'refused'},
		{row: 'closed', title: 'outbound, bound address', to: 'FAR4:8080', options: ['--bind', 'OWN4:0'], expect: 'refused'},
		{row: 'closed', title: 'inbound', from: 'far', to: 'OWN4:8081', expect: 'refused'},
		{row: 'closed', title: 'inbound, IPv6', from: 'far', to: '[OWN6]:8081', expect: 'refused'},
		{row: 'closed', title: 'inbound, where nobody listens', from: 'far', to: 'OWN4:9', expect: 'refused'},
		{row: 'closed', title: '15008', from: 'far', to: 'OWN4:15008', expect: 'refused'},
		{row: 'closed', title: 'DNS, connected', to: 'FAR4:53', dns: true, expect: 'refused'},
		{row: 'closed', title: 'DNS, connected, IPv6', to: '[FAR6]:53', dns: true, expect: 'refused'},
		{row: 'closed', title: 'DNS, unconnected', to: 'FAR4:53', dns: true, options: ['--unconnected'], expect: 'fails', outcome: 'TIMEOUT'},
		{row: 'closed', title: 'DNS over TCP', to: 'FAR4:53', dns: true, options: ['--tcp'], expect: 'refused'},
		{row: 'closed', title: 'the proxy\'s mark passes', to: 'FAR4:8080', options: ['--mark', '0x539'], expect: 'direct'},
		{row: 'closed', title: 'own address passes', to: 'OWN4:8081', expect: 'direct'},
		{row: 'closed', title: 'the node passes', from: 'node', to: 'OWN4:8081', expect: 'direct'},
	]},
	{title: 'sidecar', mode: 'sidecar', cases: SIDECAR},
	{
		title: 'sidecar, lists', mode: 'sidecar', cases: SIDECAR_LISTS,
		sidecar: {
			includeOutboundIPRanges: '10.77.0.160/28,fd77::a0/124', excludeOutboundIPRanges: '10.77.0.171/32,fd77::ab/128',
			includeOutboundPorts: '5353,9000', excludeOutboundPorts: '8443', includeInboundPorts: '8081,15008,15020',
		},
	},
	{
		title: 'sidecar, exclusions', mode: 'sidecar', cases: SIDECAR_EXCLUDES,
		sidecar: {excludeOutboundIPRanges: '0.0.0.0/0,fd77::a0/124', excludeInboundPorts: '8082,9090'},
	},
	{title: 'sidecar, nothing included', mode: 'sidecar', sidecar: {includeOutboundIPRanges: '', includeInboundPorts: ''}, cases: SIDECAR_NOTHING},
	{title: 'sidecar, loopback included', mode: 'sidecar', sidecar: {includeOutboundIPRanges: '127.0.0.0/8,10.77.0.0/24'}, cases: SIDECAR_LOOPBACK},
	{title: 'sidecar, DNS', mode: 'sidecar', dns: true, cases: SIDECAR_DNS},
	{title: 'sidecar, DNS excluded', mode: 'sidecar', dns: true, sidecar: {excludeOutboundPorts: '53'}, cases: SIDECAR_DNS_EXCLUDED},
	{title: 'sidecar, an interface excluded', mode: 'sidecar', dns: true, net1: true, sidecar: {excludeInterfaces: 'net1'}, cases: SIDECAR_INTERFACE},
	{title: 'sidecar, no proxy', mode: 'sidecar', dns: true, noProxy: true, cases: [
		{row: 'closed', title: 'outbound', to: 'FAR4:8080', expect: 'refused'},
		{row: 'closed', title: 'outbound, IPv6', to: '[FAR6]:8080', expect: 'refused'},
		{row: 'closed', title: 'inbound', from: 'far', to: 'OWN4:8081', expect: 'refused'},
		{row: 'closed', title: 'inbound, IPv6', from: 'far', to: '[OWN6]:8081', expect: 'refused'},
		{row: 'closed', title: 'inbound from the node', from: 'node', to: 'OWN4:8081', expect: 'refused'},
		{row: 'closed', title: 'the proxy to its own address', to: 'OWN4:8081', as: PROXY_BOTH, expect: 'refused'},
		// The rules put the query in a conntrack zone of its own, where the ICMP error does not find it.
		{row: 'closed', title: 'DNS', to: 'FAR4:53', dns: true, expect: 'fails', outcome: 'TIMEOUT', differs: {expect: 'refused', outcome: 'ECONNREFUSED'}},
		{row: 'closed', title: 'DNS over TCP', to: '[FAR6]:53', dns: true, options: ['--tcp'], expect: 'refused'},
		{row: 'closed', title: 'the proxy\'s own', to: 'FAR4:8080', as: PROXY_BOTH, expect: 'direct'},
		{row: 'closed', title: '15008', from: 'far', to: 'OWN4:15008', expect: 'direct'},
	]},
];
